# mmscale/data/stream/packing.py, blending.py: properties of shuffling, packing, blending, dealing, for odd sizes too.
"""Tests of the arithmetic of the data order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmscale.bench.corpus import synthetic_corpus
from mmscale.data.stream.blending import blend
from mmscale.data.stream.packing import Purpose, check_lengths, deal, pack, pack_epoch, permutation
from mmscale.errors import DataError

lengths_of_documents = st.lists(st.integers(1, 64), min_size=1, max_size=200).map(np.array)


def fill(lengths: np.ndarray, packing) -> np.ndarray:
    return packing.sums(lengths[:, None])[:, 0]


@settings(deadline=None)
@given(lengths=lengths_of_documents, window=st.integers(1, 50))
def test_packing_holds_every_document_once_and_never_cuts(lengths: np.ndarray, window: int) -> None:
    packing = pack(lengths, seq_length=64, window=window)
    np.testing.assert_array_equal(np.sort(packing.documents), np.arange(len(lengths)))
    assert fill(lengths, packing).max() <= 64
    assert (np.diff(packing.starts) > 0).all()
    for begin, end in itertools.pairwise(packing.starts):  # a sequence never mixes windows
        assert len(set(packing.documents[begin:end] // window)) == 1


@settings(deadline=None)
@given(lengths=lengths_of_documents)
def test_best_fit_decreasing_as_a_plain_loop(lengths: np.ndarray) -> None:
    bins: list[tuple[int, list[int]]] = []  # free, documents
    for n in np.argsort(-lengths, kind="stable"):
        fitting = [b for b in range(len(bins)) if bins[b][0] >= lengths[n]]
        if not fitting:
            bins.append((64, []))
        best = min(fitting, key=lambda b: bins[b][0], default=len(bins) - 1)
        bins[best] = (bins[best][0] - lengths[n], [*bins[best][1], n])
    packing = pack(lengths, seq_length=64, window=1000)
    assert sorted(64 - fill(lengths, packing)) == sorted(free for free, _ in bins)


@settings(deadline=None)
@given(lengths=lengths_of_documents, epoch=st.integers(0, 5), shuffle=st.booleans())
def test_an_epoch_is_a_pure_function(lengths: np.ndarray, epoch: int, shuffle: bool) -> None:
    arguments = {"seq_length": 64, "window": 32, "seed": 7, "source": 1, "epoch": epoch, "shuffle": shuffle}
    once, again = pack_epoch(lengths, **arguments), pack_epoch(lengths, **arguments)
    np.testing.assert_array_equal(np.sort(once.documents), np.arange(len(lengths)))
    np.testing.assert_array_equal(once.documents, again.documents)
    np.testing.assert_array_equal(once.starts, again.starts)
    assert fill(lengths, once).max() <= 64


def test_permutations_are_stable_and_differ() -> None:
    # These numbers are a promise: a changed order would repeat documents of runs that are resumed.
    assert permutation(8, seed=1, source=0, purpose=Purpose.DOCUMENTS, number=0).tolist() == [3, 5, 2, 7, 0, 6, 1, 4]
    chosen = [
        {"seed": 2, "source": 0, "purpose": Purpose.DOCUMENTS, "number": 0},
        {"seed": 1, "source": 1, "purpose": Purpose.DOCUMENTS, "number": 0},
        {"seed": 1, "source": 0, "purpose": Purpose.SEQUENCES, "number": 0},
        {"seed": 1, "source": 0, "purpose": Purpose.DOCUMENTS, "number": 1},
    ]
    orders = {tuple(permutation(30, **some)) for some in chosen}
    assert len(orders) == 4
    assert permutation(0, seed=2**70, source=0, purpose=Purpose.GROUPS, number=0).tolist() == []


def test_too_long_documents_are_named_with_a_way_out() -> None:
    with pytest.raises(
        DataError, match=r"here: document 1 has 9 tokens, model.seq_length is 8; 1 of 2 documents"
    ) as error:
        check_lengths(np.array([8, 9]), seq_length=8, what="here")
    assert "raise model.seq_length to 9" in error.value.remedy
    assert "max_document_tokens=8" in error.value.remedy


@settings(deadline=None)
@given(data=st.data(), group=st.integers(1, 6), groups=st.integers(1, 20), modalities=st.integers(1, 4))
def test_dealing_gives_every_sequence_once(data: st.DataObject, group: int, groups: int, modalities: int) -> None:
    row = st.lists(st.integers(0, 100), min_size=modalities, max_size=modalities)
    counts = np.array(data.draw(st.lists(row, min_size=group * groups, max_size=group * groups)))
    dealt = deal(counts, group=group)
    assert dealt.shape == (groups, group)
    np.testing.assert_array_equal(np.sort(dealt.ravel()), np.arange(group * groups))
    np.testing.assert_array_equal(dealt, deal(counts, group=group))


@pytest.mark.parametrize(("group", "at_most"), [(4, 0.35), (8, 0.2)])
def test_dealing_beats_shuffling_on_the_synthetic_corpus(group: int, at_most: float) -> None:
    counts = synthetic_corpus(documents=20_000).counts
    packing = pack_epoch(counts.sum(axis=1), seq_length=4096, window=8192, seed=1, source=0, epoch=0)
    sequences = packing.sums(counts)[:4096]
    dealt = np.concatenate([half[deal(half, group=group)] for half in np.split(sequences, 2)])

    def deviation(groups: np.ndarray) -> float:
        total = groups.sum(axis=1)
        return float((total[:, 1] / total.sum(axis=1)).std())

    assert deviation(dealt) < at_most * deviation(sequences.reshape(-1, group, 2))


def test_dealing_balances_three_modalities() -> None:
    rng = np.random.default_rng(0)
    shares = rng.dirichlet([0.5, 0.5, 0.5], size=1024)
    counts = (shares * 1000).astype(np.int64)
    shuffled = counts.reshape(-1, 4, 3).sum(axis=1).std(axis=0)
    dealt = counts[deal(counts, group=4)].sum(axis=1).std(axis=0)
    assert (dealt < 0.5 * shuffled).all()


weights_of_sources = (
    st.lists(st.just(0.0) | st.floats(0.01, 10.0), min_size=1, max_size=6)
    .filter(any)
    .map(lambda w: np.array(w) / sum(w))
)


@settings(deadline=None)
@given(weights=weights_of_sources, start=st.integers(0, 5000), count=st.integers(0, 200))
def test_any_stretch_of_a_blend_equals_the_whole(weights: np.ndarray, start: int, count: int) -> None:
    source, number = blend(weights, start=0, count=start + count)
    part = blend(weights, start=start, count=count)
    np.testing.assert_array_equal(part[0], source[start:])
    np.testing.assert_array_equal(part[1], number[start:])


@settings(deadline=None)
@given(weights=weights_of_sources, count=st.integers(1, 3000))
def test_a_blend_keeps_its_proportions_at_every_moment(weights: np.ndarray, count: int) -> None:
    source, number = blend(weights, start=0, count=count)
    given_out = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
    assert not given_out[-1][weights == 0].any()
    error = np.abs(given_out - np.arange(1, count + 1)[:, None] * weights)
    assert (error <= 0.5 + weights * len(weights) / 2 + 1e-6).all()
    for some in range(len(weights)):
        np.testing.assert_array_equal(number[source == some], np.arange((source == some).sum()))
