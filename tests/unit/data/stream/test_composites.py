"""Documents with neighbours: a plain reference, every order, resumes with changed settings, blends and weights."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmscale.data.prepared.identity import compare, identities, identity_of
from mmscale.data.prepared.manifest import parts_of, read_blend, read_manifest, write_manifest
from mmscale.data.prepared.neighbours import FILE, NO_NEIGHBOUR, read_neighbours, write_neighbours
from mmscale.data.prepared.selection import write_layer
from mmscale.data.stream.composites import ComposedSource, NeighbourUse, StoredNeighbours
from mmscale.data.stream.mixture import Mixture, open_mixture
from mmscale.data.stream.segments import Place, resume_stream
from mmscale.data.stream.source import Source
from mmscale.data.vocab import BOS, Vocabulary
from mmscale.errors import DataError
from mmscale.tables.settings import DATA_ORDERS
from tests.unit.data.corpora import VOCABULARY, corpus, prepare
from tests.unit.data.stream import test_selection

DOCUMENTS, WIDTH = 120, 4
RNG = np.random.default_rng(5)


@pytest.fixture(autouse=True, params=list(DATA_ORDERS))
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each order in turn, with small blocks."""
    monkeypatch.setitem(DATA_ORDERS, "blocks", dataclasses.replace(DATA_ORDERS["blocks"], block=24, chunk=4, above=40))
    monkeypatch.setitem(test_selection.ORDER, "name", request.param)


def table(documents: int, bank: int, *, own: bool) -> np.ndarray:
    """Random neighbours; every fifth document has none, every third has fewer columns."""
    found = RNG.permuted(np.tile(np.arange(bank), (documents, 1)), axis=1)[:, :WIDTH]
    found[np.arange(documents) % 5 == 0] = NO_NEIGHBOUR
    found[np.arange(documents) % 3 == 0, 2:] = NO_NEIGHBOUR
    if own:
        found[found == np.arange(documents)[:, None]] = (bank - 1) // 2
    return found


def made(folder: Path, seed: int = 0, **tables: int) -> Path:
    prepare(folder, corpus(DOCUMENTS, seed=seed, longest_text=20))
    of = identity_of(folder, read_manifest(folder))
    write_neighbours(folder, {"train": table(DOCUMENTS, DOCUMENTS, own=True)}, of=of, made={})
    return folder


def config(folder: Path, most: int = 2, *, loss: bool = True, **data: Any) -> Any:
    return test_selection.config(folder, retrieval={"neighbours": most, "loss": loss}, **data)


def opened(folder: Path, most: int = 2, **data: Any) -> Mixture:
    given = config(folder, most, **data)
    return open_mixture(given, "train", vocabulary=Vocabulary.from_config(given.vocab))


def live(folder: Path, consumed: int, segments: list[dict[str, Any]], most: int = 2, **data: Any) -> Place:
    given = config(folder, most, **data)
    found = identities(given, read_blend(given))
    mixture = opened(folder, most, **data)
    step = consumed // given.train.global_batch_size
    return resume_stream(given, mixture, data=found, consumed=consumed, step=step, segments=segments)


def pieces(mixture: Mixture, index: int) -> list[list[list[int]]]:
    """The single documents of each composite of a micro-batch, as token lists."""
    batch = mixture.micro_batch(index)
    found = []
    for row in range(len(batch.tokens)):
        for number in np.unique(batch.document_ids[row]):
            ids = batch.tokens[row][batch.document_ids[row] == number]
            if ids[0] != BOS:
                continue  # padding
            starts = [*np.flatnonzero(ids == BOS).tolist(), len(ids)]
            found.append([ids[a:b].tolist() for a, b in itertools.pairwise(starts)])
    return found


def test_a_composite_is_its_neighbours_then_its_document(tmp_path: Path) -> None:
    folder = made(tmp_path / "set")
    mixture, documents = opened(folder), [one.tolist() for one in corpus(DOCUMENTS, longest_text=20)]
    candidates = np.load(folder / "neighbours" / f"train-{read_neighbours(folder).splits['train'].key}.npy")
    counts: Counter[int] = Counter()
    for index in range(3 * mixture.len_epoch()):
        batch = mixture.micro_batch(index)
        assert batch.counts == tuple(int((batch.modality_ids == m).sum()) for m in range(2))
        assert batch.label_counts == mixture.label_counts(index)
        for composite in pieces(mixture, index):
            *before, query = (documents.index(one) for one in composite)
            assert len(set(before)) == len(before) <= 2
            assert set(before) <= set(candidates[query].tolist()) - {NO_NEIGHBOUR, query}
            counts[len(before)] += 1
    assert min(counts.values()) > 30


def slow(source: Source, number: int, documents: list[list[int]], *, loss: bool) -> tuple[list[int], list[bool]]:
    """Tokens and trained labels of a composite by its definition."""
    query, code = number % DOCUMENTS, number // DOCUMENTS
    row = source._neighbours.of(np.array([query]))[0]
    members = []
    while code:
        code, digit = divmod(code, WIDTH + 1)
        members += [int(row[digit - 1])] if digit else []
    ids, trained = [], []
    for one in [*members, query]:
        ids += documents[one]
        trained += [False, *([loss or one == query] * (len(documents[one]) - 1))]
    return ids, trained


@pytest.mark.parametrize("loss", [True, False])
@pytest.mark.parametrize("most", [1, 3])
def test_tokens_and_masks_are_those_of_the_slow_reference(tmp_path: Path, most: int, loss: bool) -> None:
    folder = made(tmp_path / "set")
    source = opened(folder, most, loss=loss).sources[0]
    documents = [one.tolist() for one in corpus(DOCUMENTS, longest_text=20)]
    for epoch in range(3):
        numbers = source.composed(np.arange(DOCUMENTS), epoch=epoch, seed=7, position=0, seq_length=160)
        assert (source.queries(numbers) == np.arange(DOCUMENTS)).all()
        some = np.arange(DOCUMENTS)[3:60:7]
        again = source.composed(some, epoch=epoch, seed=7, position=0, seq_length=160)
        assert (again == numbers[some]).all(), "a function of each document alone"
        rows = source.rows(numbers)
        assert rows.lengths.max() <= 160
        ids = source.read(numbers)
        trained = source.trained(numbers, rows, VOCABULARY.modality_of(ids))
        wanted = [slow(source, int(one), documents, loss=loss) for one in numbers]
        assert ids.tolist() == [token for tokens, _ in wanted for token in tokens]
        assert trained.tolist() == [flag for _, flags in wanted for flag in flags]
        assert rows.labels.sum() == trained.sum()
    other = source.composed(np.arange(DOCUMENTS), epoch=4, seed=7, position=0, seq_length=160)
    assert (other != numbers).any()


def test_numbers_of_neighbours_are_drawn_uniformly_and_all_columns_occur(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    prepare(folder, corpus(DOCUMENTS, longest_text=5))
    own = (np.arange(DOCUMENTS)[:, None] + np.arange(1, WIDTH + 1)) % DOCUMENTS
    write_neighbours(folder, {"train": own}, of=identity_of(folder, read_manifest(folder)), made={})
    source = opened(folder).sources[0]
    codes = np.concatenate(
        [
            source.composed(np.arange(DOCUMENTS), epoch=epoch, seed=1, position=0, seq_length=10_000) // DOCUMENTS
            for epoch in range(50)
        ]
    )
    first, second = codes % 5, codes // 5
    counts = np.bincount((first > 0).astype(int) + (second > 0), minlength=3)
    assert (np.abs(counts / len(codes) - 1 / 3) < 0.02).all()
    assert (np.abs(np.bincount(first[first > 0])[1:] / (first > 0).sum() - 1 / 4) < 0.03).all()
    assert (first[second > 0] != second[second > 0]).all()


def test_off_is_bit_identical(tmp_path: Path) -> None:
    folder = made(tmp_path / "set")
    with_tables = opened(folder, 0)
    (folder / FILE).unlink()
    plain = test_selection.opened(folder)
    for index in range(5):
        for field in dataclasses.fields(plain.micro_batch(0)):
            one, other = (getattr(each.micro_batch(index), field.name) for each in (plain, with_tables))
            assert np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other
    assert with_tables.sources[0].identity == plain.sources[0].identity


def test_an_epoch_reads_every_document_once_as_a_query_and_a_resume_goes_on(tmp_path: Path) -> None:
    folder = made(tmp_path / "set")
    mixture = opened(folder)
    read: list[int] = []
    index = 0
    while len(read) < DOCUMENTS:
        read += [int(one) % DOCUMENTS for _, documents in mixture.documents(index) for one in documents]
        index += 1
    first = Counter(read)
    assert sum(count > 1 for count in first.values()) < 20  # of the next epoch, within the last window
    again = pickle.loads(pickle.dumps(opened(folder)))
    assert (again.micro_batch(index).tokens == mixture.micro_batch(index).tokens).all()


@pytest.mark.parametrize("change", [(2, 1), (0, 2), (2, 0), (2, "table")])
def test_settings_change_between_attempts_and_no_document_is_read_twice(tmp_path: Path, change: tuple) -> None:
    folder = made(tmp_path / "set")
    before, after = change
    first = live(folder, 0, [], before)
    consumed = 12
    read = [int(one) % DOCUMENTS for i in range(consumed // 2) for _, ds in first.mixture.documents(i) for one in ds]
    if after == "table":
        of = identity_of(folder, read_manifest(folder))
        write_neighbours(folder, {"train": table(DOCUMENTS, DOCUMENTS, own=True)}, of=of, made={})
        after = before
    second = live(folder, consumed, first.segments, after)
    assert len(second.segments) == 2 and second.lines
    (begin,) = second.mixture.begins
    left = [int(one) for epoch, documents in begin.leftovers for one in documents if epoch == 0]
    assert not set(left) & set(read) and len(set(read)) == len(read)
    assert len(read) + begin.unread == DOCUMENTS
    ahead = [int(one) % DOCUMENTS for i in range(4) for _, ds in second.mixture.documents(i) for one in ds]
    assert len(ahead) == len(set(ahead)) and not set(ahead) & set(read)
    third = live(folder, consumed, second.segments, after)
    assert third.segments == second.segments and not third.lines
    assert (third.mixture.micro_batch(1).tokens == second.mixture.micro_batch(1).tokens).all()


def test_the_loss_on_neighbours_does_not_change_the_order(tmp_path: Path) -> None:
    folder = made(tmp_path / "set")
    first = live(folder, 0, [])
    second = live(folder, 8, first.segments, loss=False)
    assert second.segments == first.segments
    one, other = first.mixture.micro_batch(4), second.mixture.micro_batch(4)
    assert (one.tokens == other.tokens).all()
    assert 0 < other.loss_mask.sum() < one.loss_mask.sum()
    assert (other.loss_mask <= one.loss_mask).all()


def test_documents_without_weight_are_neither_read_nor_neighbours(tmp_path: Path) -> None:
    folder = made(tmp_path / "set")
    manifest = read_manifest(folder)
    keep = np.arange(DOCUMENTS) % 4 != 1
    of = identity_of(folder, manifest)
    write_layer(folder, manifest, parts_of(folder, manifest, "train"), keep, name="select", of=of, made={})
    mixture, documents = opened(folder), [one.tolist() for one in corpus(DOCUMENTS, longest_text=20)]
    seen = {
        documents.index(one)
        for index in range(mixture.len_epoch())
        for composite in pieces(mixture, index)
        for one in composite
    }
    assert seen and all(keep[list(seen)])
    ignoring = opened(folder, selection="ignore")
    assert any(len(own) > 1 for own in pieces(ignoring, 0))


def test_neighbours_come_from_the_same_source_of_a_blend(tmp_path: Path) -> None:
    folders = [made(tmp_path / "one"), made(tmp_path / "two", seed=1)]
    given = test_selection.config(
        folders[0], blend=[{"path": str(one)} for one in folders], retrieval={"neighbours": 2}
    )
    mixture = open_mixture(given, "train", vocabulary=Vocabulary.from_config(given.vocab))
    corpora = [[one.tolist() for one in corpus(DOCUMENTS, seed=seed, longest_text=20)] for seed in (0, 1)]
    composed = 0
    for index in range(6):
        for composite in pieces(mixture, index):
            assert any(all(one in own for one in composite) for own in corpora)
            composed += len(composite) > 1
    assert composed > 5


@pytest.mark.parametrize("evaluation", [0, 1, 2, "random"])
def test_evaluation_reads_each_held_out_document_once_with_training_documents(tmp_path: Path, evaluation: Any) -> None:
    folder = tmp_path / "set"
    train, held_out = corpus(DOCUMENTS, longest_text=20), corpus(30, seed=3, longest_text=20)
    prepare(folder, held_out, split="validation")
    other = read_manifest(folder)
    prepare(folder, train)
    manifest = read_manifest(folder)
    splits = manifest.splits | {"validation": other.splits["validation"]}
    write_manifest(folder, manifest.model_copy(update={"splits": splits}))
    of = identity_of(folder, read_manifest(folder))
    tables = {"train": table(DOCUMENTS, DOCUMENTS, own=True), "validation": table(30, DOCUMENTS, own=False)}
    write_neighbours(folder, tables, of=of, made={})
    given = test_selection.config(folder, retrieval={"neighbours": 2, "evaluation": evaluation})
    mixture = open_mixture(given, "validation", vocabulary=VOCABULARY)
    bank, queries = [one.tolist() for one in train], [one.tolist() for one in held_out]
    most = 2 if evaluation == "random" else evaluation
    read, labels, before_all = [], 0, 0
    for index in range(mixture.len_epoch()):
        batch = mixture.micro_batch(index)
        labels += int(batch.loss_mask.sum())
        for *before, query in pieces(mixture, index):
            place = queries.index(query)
            read.append(place)
            numbers = [bank.index(one) for one in before]
            before_all += len(numbers)
            assert len(numbers) <= most
            if evaluation != "random":
                wanted = [one for one in tables["validation"][place].tolist() if one != NO_NEIGHBOUR]
                assert numbers == [one for one in wanted[:most] if one in numbers]
    assert before_all >= 15 * most
    assert sorted(read) == list(range(30))
    assert labels == sum(len(one) - 1 for one in held_out), "no token of a neighbour is in a held-out loss"


def test_missing_foreign_and_damaged_tables_are_refused(tmp_path: Path) -> None:
    folder = made(tmp_path / "set")
    key = read_neighbours(folder).splits["train"].key
    file = folder / "neighbours" / f"train-{key}.npy"
    whole = file.read_bytes()
    np.save(file, np.full((DOCUMENTS, WIDTH), DOCUMENTS))
    with pytest.raises(DataError, match="numbers outside of the 120 training documents"):
        opened(folder).micro_batch(0)
    np.save(file, np.zeros((3, WIDTH), np.int64))
    with pytest.raises(DataError, match="not neighbours of 120 documents"):
        opened(folder)
    file.write_bytes(whole[:-8])
    with pytest.raises(DataError, match="cannot be read"):
        opened(folder)
    text = (folder / FILE).read_text()
    (folder / FILE).write_text(text.replace(identity_of(folder, read_manifest(folder)), "0" * 16))
    with pytest.raises(DataError, match="other documents"):
        opened(folder)
    (folder / FILE).write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        opened(folder)
    (folder / FILE).write_text(text.replace('"format": 1', '"format": 9'))
    with pytest.raises(DataError, match="has format 9"):
        opened(folder)
    (folder / FILE).unlink()
    with pytest.raises(DataError, match="has no neighbours"):
        opened(folder)


def test_changes_of_neighbours_are_listed(tmp_path: Path) -> None:
    folder = made(tmp_path / "set")
    old, new = (identities(given, read_blend(given)) for given in (config(folder, 0), config(folder, 2)))
    lines, _ = compare(old, new)
    key = read_neighbours(folder).splits["train"].key
    assert lines == [f"data: neighbours of the documents of {folder}: none -> 2-{key}"]


def test_documents_never_become_longer_than_a_sequence(tmp_path: Path) -> None:
    folder = made(tmp_path / "set")
    plain = Source(folder, split="train", vocabulary=VOCABULARY)
    stored = StoredNeighbours(plain, read_neighbours(folder).splits["train"].key, bank=DOCUMENTS)
    use = NeighbourUse(4, sampled=False, loss=True)
    source = ComposedSource(plain, bank=plain, neighbours=stored, use=use, name="test")
    longest = int(plain.lengths.max())
    for room in (longest, longest + 20, 1000):
        numbers = source.composed(np.arange(DOCUMENTS), epoch=0, seed=0, position=0, seq_length=room)
        assert source.rows(numbers).lengths.max() <= room
    assert (numbers >= DOCUMENTS).any()
