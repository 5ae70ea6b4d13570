"""The stream of micro-batches: a micro-batch is a pure function of its number, for every caller."""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmscale.data.stream.loader import BatchLoader
from mmscale.data.stream.micro_batch import MicroBatch, slot_usage
from mmscale.data.stream.mixture import Mixture
from mmscale.data.stream.sharing import RankPart
from mmscale.data.vocab import BOS, EOS, PAD
from tests.unit.data.corpora import THREE, VOCABULARY, corpus, document, prepare
from tests.unit.data.stream.mixtures import (
    DOCUMENTS,
    OPTIONS,
    SEQ,
    digest,
    documents_in,
    mix,
    open_sources,
)

# What a micro-batch holds


def test_shapes_types_and_padding(folder: Path) -> None:
    batch = mix(folder).micro_batch(0)
    types = {"tokens": "int64", "labels": "int64", "loss_mask": "float32", "position_ids": "int64"}
    types |= {"document_ids": "int32", "modality_ids": "int8"}
    for name, dtype in types.items():
        array = getattr(batch, name)
        assert (array.shape, array.dtype) == ((4, SEQ), dtype), name
    pad = batch.tokens == PAD
    assert pad.any()
    assert (batch.modality_ids[pad] == -1).all()
    assert (batch.loss_mask[pad] == 0).all()
    assert (batch.labels[pad] == PAD).all()
    assert batch.sources.tolist() == [0, 0, 0, 0]
    for row in range(4):  # padding is one document of its own, behind the others
        if pad[row].any():
            first = int(pad[row].argmax())
            assert pad[row, first:].all()
            assert set(batch.document_ids[row, first:]) == {batch.document_ids[row, first - 1] + 1}


def test_positions_restart_and_labels_stay_inside_documents(folder: Path) -> None:
    mixture = mix(folder)
    for index in range(5):
        batch = mixture.micro_batch(index)
        for row in range(4):
            for number in np.unique(batch.document_ids[row]):
                place = np.flatnonzero(batch.document_ids[row] == number)
                assert (np.diff(place) == 1).all()
                np.testing.assert_array_equal(batch.position_ids[row, place], np.arange(len(place)))
                ids = batch.tokens[row, place]
                if ids[0] == PAD:
                    continue
                assert ids[0] == BOS
                assert ids[-1] == EOS
                np.testing.assert_array_equal(batch.labels[row, place], [*ids[1:], PAD])
                np.testing.assert_array_equal(batch.loss_mask[row, place], [1] * (len(place) - 1) + [0])


@pytest.mark.usefixtures("order")
def test_counts_agree_with_tokens(folder: Path) -> None:
    mixture = mix(folder)
    for index in range(5):
        batch = mixture.micro_batch(index)
        modality = VOCABULARY.modality_of(batch.tokens)
        np.testing.assert_array_equal(batch.modality_ids, modality)
        assert batch.counts == tuple((modality == m).sum() for m in range(2)) == mixture.counts(index)
        labels = VOCABULARY.modality_of(batch.labels)
        trained = tuple(int(batch.loss_mask[labels == m].sum()) for m in range(2))
        assert batch.label_counts == trained == mixture.label_counts(index)


@pytest.mark.parametrize("multiple", [1, 8, 16])
def test_documents_are_padded_to_a_multiple(folder: Path, documents: list[np.ndarray], multiple: int) -> None:
    """Every document once an epoch, starting at a multiple, with its own labels; padding is its end."""
    mixture = mix(folder, document_multiple=multiple, once=True)
    found: list[tuple[int, ...]] = []
    for index in range(mixture.len_epoch()):
        batch = mixture.micro_batch(index)
        assert batch.counts == tuple((batch.modality_ids == m).sum() for m in range(2)) == mixture.counts(index)
        for row, numbers in enumerate(batch.document_ids):
            borders = np.flatnonzero(np.diff(numbers, prepend=-1, append=-1))
            assert (borders % multiple == 0).all()
            for start, end in pairwise(borders):
                np.testing.assert_array_equal(batch.position_ids[row, start:end], np.arange(end - start))
                ids = batch.tokens[row, start:end]
                if ids[0] == PAD:
                    continue
                length = int(np.flatnonzero(ids == EOS)[-1]) + 1
                assert end - start - length < multiple and (ids[length:] == PAD).all()
                np.testing.assert_array_equal(batch.labels[row, start : start + length], [*ids[1:length], PAD])
                np.testing.assert_array_equal(batch.loss_mask[row, start:end] > 0, np.arange(end - start) < length - 1)
                found.append(tuple(ids[:length].tolist()))
    assert sorted(found) == sorted(tuple(ids.tolist()) for ids in documents)


@pytest.mark.parametrize(("bits", "text", "image"), [(0b01, True, False), (0b10, False, True), (0b00, False, False)])
def test_loss_bits_are_honoured(
    tmp_path: Path, documents: list[np.ndarray], bits: int, text: bool, image: bool
) -> None:
    batch = mix(prepare(tmp_path / "set", documents, loss=[bits] * DOCUMENTS)).micro_batch(0)
    labels = VOCABULARY.modality_of(batch.labels)
    assert batch.loss_mask[labels == 0].any() == text == (batch.label_counts[0] > 0)
    assert batch.loss_mask[labels == 1].any() == image == (batch.label_counts[1] > 0)


def test_three_modalities(tmp_path: Path, documents: list[np.ndarray]) -> None:
    spoken = [np.where((ids >= 100) & (n % 4 == 1), ids % 18 + 132, ids) for n, ids in enumerate(documents)]
    folder = prepare(tmp_path / "set", spoken, vocabulary=THREE)
    batch = Mixture(open_sources(folder, vocabulary=THREE), THREE, **OPTIONS).micro_batch(0)
    assert all(count > 0 for count in batch.counts)
    assert len(batch.label_counts) == 3


def epoch_ends(mixture: Mixture) -> Iterator[int]:
    """Sequences of the stream up to the end of each epoch."""
    stream, sequences, documents = mixture.streams[0], 0, 0
    for number in itertools.count():
        starts = stream.block(number).packing.starts
        for end in starts[1:]:
            sequences += 1
            if (documents + end) % DOCUMENTS == 0:
                yield sequences
        documents += int(starts[-1])


NOWHERE = Path("/dev/null/none")  # a cache that cannot be written: nothing waits for the disk


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(1, 7), window=st.integers(1, 40), deal_window=st.integers(1, 40), balance=st.booleans())
def test_epochs_hold_every_document_once(
    folder: Path, documents: list[np.ndarray], order: str, size: int, window: int, deal_window: int, balance: bool
) -> None:
    options = {"pack_window": window, "deal_window": deal_window, "balance": balance, "cache": NOWHERE}
    mixture = mix(folder, micro_batch_size=size, **options)
    seen: Counter[tuple[int, ...]] = Counter()
    ends = epoch_ends(mixture)
    *_, needed = itertools.islice(ends, 3)  # sequences of the first epochs
    windows = -(-needed // (mixture._groups * size))
    for index in range(windows * mixture._groups):
        seen.update(documents_in(mixture.micro_batch(index)))
    assert set(seen) == {tuple(ids.tolist()) for ids in documents}
    # Whole windows were read, so two whole epochs and the beginning of the next ones.
    read = windows * mixture._groups * size
    epochs = 3 + sum(1 for _ in itertools.takewhile(lambda end: end <= read, ends))
    assert set(seen.values()) <= {epochs, epochs + 1}


# Purity


@pytest.mark.usefixtures("order")
def test_a_micro_batch_depends_on_its_number_only(folder: Path) -> None:
    mixture = mix(folder)
    expected = [digest(mixture.micro_batch(index)) for index in range(40)]
    assert len(set(expected)) == 40
    backwards = mix(folder)
    assert [digest(backwards.micro_batch(index)) for index in reversed(range(40))] == expected[::-1]
    assert digest(pickle.loads(pickle.dumps(mixture)).micro_batch(17)) == expected[17]

    def work(queue: Any) -> None:
        queue.put([digest(mix(folder).micro_batch(index)) for index in (39, 3, 12)])

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=work, args=(queue,))
    process.start()
    assert queue.get(timeout=300) == [expected[39], expected[3], expected[12]]
    process.join()


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("change", [{"seed": 4}, {"pack_window": 15}, {"seq_length": SEQ + 1}, {"shuffle": False}])
def test_settings_change_the_order(folder: Path, change: dict[str, Any]) -> None:
    assert documents_in(mix(folder).micro_batch(0)) != documents_in(mix(folder, **change).micro_batch(0))


@pytest.mark.usefixtures("order")
def test_stored_order_without_shuffling(folder: Path, documents: list[np.ndarray]) -> None:
    mixture = mix(folder, shuffle=False, balance=False, pack_window=1, once=True)
    found = [ids for index in range(mixture.len_epoch()) for ids in documents_in(mixture.micro_batch(index))]
    assert found == [tuple(ids.tolist()) for ids in documents]


# One pass


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("size", [1, 3, 4, 500])
def test_one_pass_holds_every_document_once_and_then_nothing(
    folder: Path, tmp_path: Path, documents: list[np.ndarray], size: int
) -> None:
    more = corpus(15, seed=5)
    mixture = mix(folder, prepare(tmp_path / "more", more), micro_batch_size=size, once=True)
    batches = [mixture.micro_batch(index) for index in range(mixture.len_epoch())]
    found = Counter(ids for batch in batches for ids in documents_in(batch))
    assert found == Counter(tuple(ids.tolist()) for ids in [*documents, *more])
    for index in (mixture.len_epoch(), mixture.len_epoch() + 1000):
        empty = mixture.micro_batch(index)
        assert (empty.tokens == PAD).all()
        assert empty.counts == empty.label_counts == (0, 0)
        assert (empty.sources == -1).all()
        assert (empty.document_ids == 0).all()


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("dp", [1, 2, 4])
def test_ranks_share_one_pass(folder: Path, documents: list[np.ndarray], dp: int) -> None:
    found: Counter[tuple[int, ...]] = Counter()
    steps = set()
    for rank in range(dp):
        batches = list(BatchLoader(mix(folder, once=True), dp_rank=rank, dp_size=dp, micro_batches_per_step=4))
        steps.add(len(batches))
        found.update(ids for step in batches for batch in step.micro_batches for ids in documents_in(batch))
    assert found == Counter(tuple(ids.tolist()) for ids in documents)
    assert len(steps) == 1


# Blending and balance


@pytest.mark.usefixtures("order")
def test_a_blend_follows_its_weights_inside_micro_batches(folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    text = prepare(tmp_path / "text", [document(n, text=int(rng.integers(5, 60)), rng=rng) for n in range(90)])
    images = prepare(tmp_path / "images", [document(n, text=2, images=3, rng=rng) for n in range(60)])
    mixture = mix(text, images, weights=[3.0, 1.0], deal_window=64, micro_batch_size=8)
    batches = [mixture.micro_batch(index) for index in range(40)]
    share = np.mean([(batch.sources == 1).mean() for batch in batches])
    assert share == pytest.approx(0.25, abs=0.01)
    assert all(0 < (batch.sources == 1).sum() < 8 for batch in batches)  # every micro-batch holds both
    unbalanced = mix(text, images, weights=[3.0, 1.0], deal_window=64, micro_batch_size=8, balance=False)

    def deviation(some: Mixture) -> float:
        counts = np.array([some.counts(index) for index in range(40)])
        return float((counts[:, 1] / counts.sum(axis=1)).std())

    assert deviation(mixture) <= deviation(unbalanced)


@pytest.mark.usefixtures("order")
def test_a_source_of_weight_0_is_not_trained_on(folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    text = prepare(tmp_path / "text", [document(n, text=20, rng=rng) for n in range(40)])
    images = prepare(tmp_path / "images", [document(n, text=2, images=3, rng=rng) for n in range(40)])
    mixture = mix(text, images, weights=[1.0, 0.0])
    assert all((mixture.micro_batch(index).sources == 0).all() for index in range(12))
    assert mixture.len_epoch() == mix(text).len_epoch()
    found = {source for index in range(12) for source in mix(text, images, once=True).micro_batch(index).sources}
    assert {0, 1} <= found  # held-out passes read every source


@pytest.mark.usefixtures("order")
def test_sequence_counts_are_those_of_the_tokens(folder: Path) -> None:
    mixture = mix(folder, once=True)
    for index in range(mixture.len_epoch() + 1):  # the last one is empty
        batch = mixture.micro_batch(index)
        want = [[int((row == m).sum()) for m in range(2)] for row in batch.modality_ids]
        assert mixture.sequence_counts(index).tolist() == want
        assert mixture.counts(index) == tuple(map(sum, zip(*want, strict=True)))


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("ep", [1, 2, 4])
def test_ranks_that_exchange_tokens_know_each_others_counts(folder: Path, ep: int) -> None:
    """Also from a number on that is no multiple of the ranks, and after the end of a pass."""
    mixture, dp = mix(folder), 4
    last = 13
    read: dict[int, list[MicroBatch]] = {}
    for rank in range(dp):
        part = RankPart(rank, dp, tuple(range(rank // ep * ep, rank // ep * ep + ep)))
        assert list(part.numbers(6, 8)) == [6 + rank, 10 + rank]
        read[rank] = [part.read(mixture, number, last=last) for number in part.numbers(6, 12)]
    for rank, batches in read.items():
        first = rank // ep * ep
        for place, batch in enumerate(batches):
            together = [read[other][place] for other in range(first, first + ep)]
            if ep == 1:
                assert batch.everyone is None
                continue
            want = [[[(row == m).sum() for m in range(2)] for row in one.modality_ids] for one in together]
            assert batch.everyone is not None and batch.everyone.tolist() == want


@pytest.mark.usefixtures("order")
def test_balanced_micro_batches_waste_fewer_slots(folder: Path) -> None:
    def waste(**options: Any) -> tuple[float, int]:
        mixture = mix(folder, deal_window=64, **options)
        counts = np.array([mixture.counts(index) for index in range(36)])
        nominal = tuple(counts.mean(axis=0).astype(int).tolist())
        overflow = [
            slot_usage(mixture.micro_batch(i), nominal=nominal, scope="micro_batch").overflow for i in range(36)
        ]
        return float(counts[:, 1].std()), int(np.sum(overflow))

    balanced, shuffled = waste(), waste(balance=False)
    assert balanced[0] < 0.5 * shuffled[0]
    assert balanced[1] < 0.5 * shuffled[1]


def test_slot_usage_counts_both_scopes(folder: Path) -> None:
    batch = mix(folder).micro_batch(0)
    text, image = batch.counts
    whole = slot_usage(batch, nominal=(text - 5, image + 7), scope="micro_batch")
    assert (whole.overflow, whole.unused) == ((5, 0), (0, 7))
    rows = [[int((row == m).sum()) for m in range(2)] for row in batch.modality_ids]
    each = slot_usage(batch, nominal=(60, 40), scope="sequence")
    assert each.overflow == (sum(max(0, t - 60) for t, _ in rows), sum(max(0, i - 40) for _, i in rows))
    assert each.unused == (sum(max(0, 60 - t) for t, _ in rows), sum(max(0, 40 - i) for _, i in rows))
