"""Weights of documents in the order of the data: functions of document and epoch, in every order, across resumes."""

from __future__ import annotations

import dataclasses
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmscale.config.load import resolve
from mmscale.data.prepared import table_facts
from mmscale.data.prepared.identity import compare, identities, identity_of
from mmscale.data.prepared.manifest import parts_of, read_blend, read_manifest
from mmscale.data.prepared.selection import FOLDER, copies, remove_layer, write_layer
from mmscale.data.prepared.share import nominal_share
from mmscale.data.prepared.survey import survey
from mmscale.data.stream.mixture import Mixture, open_mixture
from mmscale.data.stream.segments import Place, resume_stream
from mmscale.data.vocab import Vocabulary
from mmscale.errors import DataError
from mmscale.tables.settings import DATA_ORDERS
from mmscale.train.log.exposure import exposure
from mmscale.train.log.progress_lines import count
from tests.unit.data.corpora import SMALL_MODEL, VOCAB, corpus, prepare

DOCUMENTS = 120
ORDER: dict[str, str] = {}


@pytest.fixture(autouse=True, params=list(DATA_ORDERS))
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each order in turn, with small blocks."""
    small = dataclasses.replace(DATA_ORDERS["blocks"], block=24, chunk=4, above=40)
    monkeypatch.setitem(DATA_ORDERS, "blocks", small)
    monkeypatch.setattr(table_facts, "LARGE", 40)
    ORDER["name"] = request.param
    return str(request.param)


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("selection") / "set", corpus(DOCUMENTS))


@pytest.fixture
def folder(corpus_folder: Path) -> Iterator[Path]:
    yield corpus_folder
    manifest = read_manifest(corpus_folder)
    for name in ("dedup", "select"):
        remove_layer(
            corpus_folder,
            manifest,
            parts_of(corpus_folder, manifest, "train"),
            name=name,
            of=identity_of(corpus_folder, manifest),
        )


def weigh(folder: Path, weights: Any, name: str = "select") -> None:
    manifest = read_manifest(folder)
    of = identity_of(folder, manifest)
    write_layer(folder, manifest, parts_of(folder, manifest, "train"), weights, name=name, of=of, made={})


def config(folder: Path, **data: Any) -> Any:
    return resolve(
        {
            "vocab": VOCAB,
            "data": {
                "blend": [{"path": str(folder)}],
                "order": ORDER["name"],
                "pack_window": 40,
                "deal_window": 16,
                "cache": "/dev/null/none",
            }
            | data,
            "model": SMALL_MODEL | {"seq_length": 160},
            "train": {"micro_batch_size": 2, "global_batch_size": 4},
        }
    )


def opened(folder: Path, **data: Any) -> Mixture:
    made = config(folder, **data)
    return open_mixture(made, "train", vocabulary=Vocabulary.from_config(made.vocab))


def live(folder: Path, consumed: int, segments: list[dict[str, Any]], **data: Any) -> Place:
    made = config(folder, **data)
    found = identities(made, read_blend(made))
    return resume_stream(
        made,
        opened(folder, **data),
        data=found,
        consumed=consumed,
        step=consumed // made.train.global_batch_size,
        segments=segments,
    )


def sequences(mixture: Mixture, count: int, *, first: int = 0) -> list[list[int]]:
    rows = [row for number in range(first, first + -(-count // 2)) for row in mixture.documents(number)]
    return [documents.tolist() for _, documents in rows][:count]


def slow_copies(weight: float, index: int, epoch: int) -> int:
    """The notebook's reference, with the offset of this project's hash."""
    mixed = (index + 0x9E3779B97F4A7C15) % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    offset = ((mixed ^ (mixed >> 31)) >> 32) / 2**32
    return int(np.floor((epoch + 1) * weight + offset) - np.floor(epoch * weight + offset))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 64, width=32), min_size=1, max_size=20),
    st.integers(0, 2**40),
    st.integers(0, 10**6),
)
def test_copies_are_those_of_the_reference_and_add_up(weights: list[float], first: int, epoch: int) -> None:
    given_weights, numbers = np.array(weights, np.float64), first + np.arange(len(weights))
    found = copies(given_weights, numbers, epoch)
    assert found.tolist() == [slow_copies(w, int(n), epoch) for w, n in zip(weights, numbers, strict=True)]
    total = sum(copies(given_weights, numbers, one) for one in range(30))
    assert (np.abs(total - 30 * given_weights) <= 1).all()
    whole = np.floor(given_weights)
    assert copies(whole, numbers, epoch).tolist() == whole.tolist()


def epoch_of(mixture: Mixture, epoch: int, weights: np.ndarray) -> Counter[int]:
    return Counter(np.repeat(np.arange(DOCUMENTS), copies(weights, np.arange(DOCUMENTS), epoch)).tolist())


@pytest.mark.parametrize("kind", ["mask", "fractions", "many", "few"])
def test_epochs_hold_documents_as_often_as_their_weights_say(folder: Path, kind: str) -> None:
    rng = np.random.default_rng(2)
    weights = {
        "mask": (rng.random(DOCUMENTS) < 0.5).astype(np.float32),
        "fractions": rng.random(DOCUMENTS).astype(np.float32) * 2,
        "many": rng.integers(0, 6, DOCUMENTS).astype(np.float32),
        "few": np.eye(1, DOCUMENTS, 77, dtype=np.float32)[0] * 0.5,  # epochs and blocks without a document
    }[kind]
    weigh(folder, weights)
    mixture = opened(folder)
    read = sequences(mixture, 400)
    assert all(len(set(one)) == len(one) for one in read), "a sequence holds a document twice"
    flat, at, epoch = [d for one in read for d in one], 0, 0
    if ORDER["name"] == "epochs":  # micro-batches of one window are dealt: epochs are told apart in the stream itself
        stream = mixture.streams[0]
        found = [
            p.packing.documents[p.packing.starts[n] : p.packing.starts[n + 1]]
            for p, ns in stream.stretch(0, 400)
            for n in ns
        ]
        flat = [int(d) for one in found for d in one]
    while ORDER["name"] == "epochs":
        wanted = epoch_of(mixture, epoch, weights.astype(float))
        if at + wanted.total() > len(flat):
            break
        assert Counter(flat[at : at + wanted.total()]) == wanted
        at, epoch = at + wanted.total(), epoch + 1
    assert ORDER["name"] == "blocks" or epoch >= 2
    assert set(flat) <= set(np.flatnonzero(weights).tolist())


def test_a_mask_gives_the_order_of_a_data_set_without_the_documents(folder: Path, tmp_path: Path) -> None:
    if ORDER["name"] != "epochs":
        pytest.skip("blocks hold documents by their numbers")
    keep = np.random.default_rng(4).random(DOCUMENTS) < 0.6
    weigh(folder, keep, "dedup")
    left = np.flatnonzero(keep)
    alone = opened(prepare(tmp_path / "left", [one for one, kept in zip(corpus(DOCUMENTS), keep, strict=True) if kept]))
    assert sequences(opened(folder), 60) == [left[one].tolist() for one in sequences(alone, 60)]
    assert opened(folder).passes(60) == alone.passes(60)
    everything = sequences(opened(folder, selection="ignore"), 60)
    assert {d for one in everything for d in one} == set(range(DOCUMENTS))


def test_layers_multiply_and_shares_and_plans_count_them(folder: Path) -> None:
    keep, weights = np.ones(DOCUMENTS, bool), np.full(DOCUMENTS, 2.0, np.float32)
    keep[1::2] = False  # the documents with images
    weigh(folder, keep, "dedup")
    weigh(folder, weights, "select")
    made = config(folder)
    assert nominal_share(made)["image"] == 0.0
    assert nominal_share(config(folder, selection="ignore"))["image"] > 0.3
    facts = survey([str(folder)])
    assert facts.documents == DOCUMENTS
    assert facts.tokens["image"] == 0
    mixture = pickle.loads(pickle.dumps(opened(folder)))
    counted = Counter(d for one in sequences(mixture, 40) for d in one)
    assert not any(d % 2 for d in counted)
    (passes,) = mixture.passes(made.train.steps * 4)
    said = exposure(made, mixture, sequences=made.train.steps * 4, parameters={})
    assert f"; {count(passes * facts.tokens['text'])} tokens" in said
    half = exposure(made, mixture, sequences=made.train.steps * 2, parameters={})  # after a change of the batch
    assert f"; {count(passes / 2 * facts.tokens['text'])} tokens" in half


def test_a_run_goes_on_where_it_was_when_weights_come_or_change(folder: Path) -> None:
    """What was read before is not read again; what is left out is not read any more; it is told."""
    before = live(folder, 0, [])
    read = sequences(before.mixture, 20)
    gone = {d for one in read for d in one}
    keep = np.random.default_rng(6).random(DOCUMENTS) < 0.5
    old = identities(config(folder), read_blend(config(folder)))
    weigh(folder, keep, "dedup")
    now = identities(config(folder), read_blend(config(folder)))
    assert compare(old, now)[0] == [f"data: weights of the documents of {folder}: none -> {now[0].selection}"]
    after = live(folder, 20, before.segments)
    assert any("no document is read twice" in line for line in after.lines)
    rest = [d for one in sequences(after.mixture, 60) for d in one]
    (begin,) = after.mixture.begins
    left = [d for _, documents in begin.leftovers for d in documents.tolist()]
    assert left, "the test reads less than an epoch before"
    assert not set(left) & gone
    if ORDER["name"] == "epochs":
        assert left == [d for d in np.flatnonzero(keep).tolist() if d not in gone]
    assert set(rest) <= set(np.flatnonzero(keep).tolist())
    # a resume without a change is exact, also across the change
    again = live(folder, 32, after.segments)
    assert again.lines == []
    assert sequences(again.mixture, 20, first=6) == sequences(after.mixture, 32)[12:]
    # weights change once more: the position under the old ones is found, as their file is kept
    weigh(folder, ~keep, "dedup")
    third = live(folder, 32, after.segments)
    assert any("no document is read twice" in line for line in third.lines)
    assert not {d for one in sequences(third.mixture, 30) for d in one} & set(np.flatnonzero(keep).tolist())
    file = folder / FOLDER / f"{now[0].selection}.npy"
    file.rename(file.with_suffix(".away"))
    with pytest.raises(DataError, match=r"the weights of documents .* cannot be read"):
        live(folder, 40, third.segments)
    file.with_suffix(".away").rename(file)


def test_a_cache_holds_the_packings_of_each_weights_apart(folder: Path, tmp_path: Path) -> None:
    """Of padded documents: read from a cache, the stream is the one that is packed anew."""
    cache, multiple = str(tmp_path / "cache"), 8
    for weight in (0.5, 2.0, 0.5):  # the third time the cache has them
        weigh(folder, np.full(DOCUMENTS, weight, np.float32))
        anew = opened(folder, document_multiple=multiple)
        wanted = sequences(anew, 40)
        assert sequences(opened(folder, document_multiple=multiple, cache=cache), 40) == wanted
        lengths = [anew.sources[0].rows(np.array(one)).lengths for one in wanted]
        assert all((-(-own // multiple) * multiple).sum() <= anew.seq_length for own in lengths)
        assert all(len(set(one)) == len(one) for one in wanted)


def test_weights_that_leave_nothing_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"no document of .* would be left"):
        weigh(folder, np.zeros(DOCUMENTS, bool))
    for bad in (np.nan, -1.0, 65.0):
        with pytest.raises(DataError, match="not all numbers from 0 to 64"):
            weigh(folder, np.full(DOCUMENTS, bad, np.float32))
    weigh(folder, np.ones(DOCUMENTS, bool))  # what stands is whole


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.3, 1.0, 2.5]), st.integers(0, 9)), min_size=1, max_size=4))
def test_over_all_changes_of_weights_no_document_is_read_too_often(
    folder: Path, lives: list[tuple[float, int]]
) -> None:
    """A document of weight 1 all along is read once in each epoch, whatever the others weigh."""
    segments: list[dict[str, Any]] = []
    consumed, counted = 0, Counter[int]()
    for weight, steps in lives:
        weights = np.ones(DOCUMENTS, np.float32)
        weights[::2] = weight
        weigh(folder, weights)
        place = live(folder, consumed, segments)
        segments = place.segments
        for one in sequences(place.mixture, 4 * steps, first=(consumed - place.mixture.start) // 2):
            counted.update(one)
        consumed += 4 * steps
    odd = [counted[d] for d in range(1, DOCUMENTS, 2)]
    assert max(odd) - min(odd) <= 2  # a window that is dealt may hold two epochs
