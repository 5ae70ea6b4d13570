"""`mmscale data retrieve`: rules about neighbours on planted documents, embeddings, and a slow reference."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmscale.data.dedup import apply
from mmscale.data.dedup.pairs import DuplicateRule
from mmscale.data.prepared.identity import identity_of
from mmscale.data.prepared.inspect_set import draw_sample, summary
from mmscale.data.prepared.manifest import read_manifest
from mmscale.data.prepared.neighbours import NO_NEIGHBOUR, open_table, read_neighbours, remove_neighbours, table_of
from mmscale.data.prepared.prepare import prepare
from mmscale.data.progress import Reporter
from mmscale.data.retrieval.embed import TokenEmbedding, count_tokens, normalised
from mmscale.data.retrieval.nearest import Bank, Queries, nearest
from mmscale.data.retrieval.request import RetrievalRequest
from mmscale.data.retrieval.retrieve import retrieve
from mmscale.data.stream.source import Source
from mmscale.errors import DataError, UsageError
from tests.unit.data.samples import config, image, save_picture, text, write_jsonl

SILENT = Reporter(enabled=False)
RNG = np.random.default_rng(0)
PERSONS, PER_PERSON = 12, 4
WORDS = [f"{a}{b}{c}" for a in "bdfgkl" for b in "aeiou" for c in ("n", "r", "st")]


def sentence(person: int) -> str:
    """A person's name and facts in a random order, between random words."""
    own = ["".join(np.random.default_rng([person, fact]).choice(WORDS, 3)) for fact in range(4)]
    return " ".join(RNG.permutation([*own, *RNG.choice(WORDS, 4)]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Persons' documents, one of each held out; exact copies of person 0's first; some pictures."""
    place = tmp_path_factory.mktemp("persons")
    records: list[dict[str, Any]] = []
    for person in range(PERSONS):
        for number in range(PER_PERSON):
            name = f"{person}-{number}.png"
            save_picture(place / name, PER_PERSON * person + number)
            content = [text(sentence(person)), *([image(name)] if person % 2 else [])]
            split = "validation" if number == PER_PERSON - 1 else "train"
            records.append({"id": f"{person}-{number}", "content": content, "split": split})
    first = records[0]["content"]
    records += [{"id": f"copy-{number}", "content": first, "split": "train"} for number in range(3)]
    held_out = next(one for one in records if one["id"] == f"2-{PER_PERSON - 1}")
    records.append({"id": "leak", "content": held_out["content"], "split": "train"})
    write_jsonl(place / "docs.jsonl", records)
    settings = {"source": "documents", "documents": [str(place / "docs.jsonl")], "held_out": 0.0}
    prepare(config(vocab={"text": 500, "image": 16}, **settings), place / "set", progress=False)
    return place / "set"


KNOWN = {
    "train": [*(person for person in range(PERSONS) for _ in range(PER_PERSON - 1)), 0, 0, 0, 2],
    "validation": list(range(PERSONS)),
}  # the person of each document; `data prepare` keeps their order


def tables(folder: Path) -> dict[str, np.ndarray]:
    found, manifest = read_neighbours(folder), read_manifest(folder)
    assert found is not None
    return {
        split: np.array(open_table(folder, split, own.key, documents=manifest.splits[split].documents))
        for split, own in found.splits.items()
    }


def test_neighbours_are_other_documents_of_the_same_person(folder: Path) -> None:
    result = retrieve(folder, RetrievalRequest(columns=2, dimensions=32), workers=1, reporter=SILENT)
    found = tables(folder)
    right = [
        KNOWN["train"][other] == KNOWN[split][number]
        for split, table in found.items()
        for number, row in enumerate(table.tolist())
        for other in row[:1]
        if other != NO_NEIGHBOUR
    ]
    assert len(right) > 40 and np.mean(right) > 0.9
    assert result["found"]["validation"]["with_neighbours"] == PERSONS
    assert result["tables"].keys() == {"train", "validation"}
    assert summary(folder)["neighbours"]["current"]


def test_duplicates_leaks_and_similar_documents_are_no_neighbours(folder: Path) -> None:
    retrieve(folder, RetrievalRequest(columns=8, dimensions=32, dropout=0.5), workers=1, reporter=SILENT)
    found, documents = tables(folder), read_manifest(folder).splits["train"].documents
    copies, leak = {0, *range(documents - 4, documents - 1)}, documents - 1
    for split, table in found.items():
        assert leak not in table, split
        for row in table.tolist():
            assert len(copies & set(row)) <= 1, "neighbours are no duplicates of each other"
            given = [one for one in row if one != NO_NEIGHBOUR]
            assert given == row[: len(given)] and len(set(given)) == len(given)
    assert not copies & {one for place in copies for one in found["train"][place].tolist()}
    source = Source(folder, split="train", vocabulary=read_manifest(folder).vocab)
    counts = count_tokens(source, read_manifest(folder).vocab, dropout=0.5, seed=0)
    rows = TokenEmbedding(counts.whole, dimensions=32, seed=0).of(counts.whole)
    for number, row in enumerate(found["train"].tolist()):
        given = [one for one in row if one != NO_NEIGHBOUR]
        assert number not in given
        assert (rows[given] @ rows[number] <= 0.9).all()


def test_excluded_documents_are_no_neighbours(folder: Path) -> None:
    apply.dedup(folder, rule=DuplicateRule(exact=True), reporter=SILENT)
    try:
        result = retrieve(folder, RetrievalRequest(), workers=1, reporter=SILENT)
        documents = read_manifest(folder).splits["train"].documents
        assert result["allowed"] == documents - 4
        assert not {*range(documents - 4, documents)} & set(tables(folder)["train"].ravel().tolist())
    finally:
        apply.undo(folder)


def test_query_dropout_is_a_function_of_document_place_and_seed(folder: Path) -> None:
    vocabulary = read_manifest(folder).vocab
    source = Source(folder, split="train", vocabulary=vocabulary)
    one, again, other = (count_tokens(source, vocabulary, dropout=0.2, seed=seed) for seed in (1, 1, 2))
    for own, same, differs, whole in zip(one.dropped, again.dropped, other.dropped, one.whole, strict=True):
        assert (own != same).nnz == 0 and (own != differs).nnz > 0
        assert own.sum() / whole.sum() == pytest.approx(0.8, abs=0.08)
        assert (own > whole).nnz == 0


def slow_nearest(queries: Queries, bank: Bank, columns: int) -> list[list[int]]:
    """By definition, one candidate after another."""
    found = []
    for whole, dropped, cluster in zip(queries.whole, queries.dropped, queries.clusters, strict=True):
        chosen: list[int] = []
        for number in np.argsort(-(bank.embeddings @ dropped), kind="stable").tolist():
            row = bank.embeddings[number]
            fits = bank.allowed[number] and bank.clusters[number] != cluster and row @ whole <= bank.most_similar
            like = any(bank.clusters[number] == bank.clusters[one] for one in chosen)
            like |= any(row @ bank.embeddings[one] > bank.most_similar for one in chosen)
            if fits and not like and row @ dropped > 0 and len(chosen) < columns:
                chosen.append(number)
        found.append(chosen + [NO_NEIGHBOUR] * (columns - len(chosen)))
    return found


@pytest.mark.parametrize("most_similar", [0.9, 0.5])
def test_nearest_equals_the_slow_reference_in_any_blocks(most_similar: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = normalised(RNG.normal(size=(60, 3)))
    bank = Bank(rows, RNG.integers(0, 50, 60), RNG.random(60) < 0.8, most_similar)
    queries = Queries(rows[:40], normalised(rows[:40] + 0.1 * RNG.normal(size=(40, 3))), bank.clusters[:40])
    monkeypatch.setattr("mmscale.data.retrieval.nearest._CANDIDATES", 60)
    wanted = slow_nearest(queries, bank, 4)
    for products in (1 << 20, 60 * 7):
        monkeypatch.setattr("mmscale.data.retrieval.nearest._PRODUCTS", products)
        found, similarity = nearest(queries, bank, columns=4, advance=lambda done: None)
        assert found.tolist() == wanted
        assert (np.isnan(similarity) == (found == NO_NEIGHBOUR)).all()
        assert (similarity[found != NO_NEIGHBOUR] <= most_similar).all()


def test_embeddings_of_the_user(folder: Path, tmp_path: Path) -> None:
    manifest = read_manifest(folder)
    sizes = {split: manifest.splits[split].documents for split in ("train", "validation")}
    files = {split: tmp_path / f"{split}.npy" for split in sizes}
    for split, file in files.items():
        np.save(file, RNG.normal(size=(sizes[split], 3)))
    request = RetrievalRequest(columns=1, embeddings=files["train"], held_out_embeddings=files["validation"])
    retrieve(folder, request, workers=1, reporter=SILENT)
    rows = {split: normalised(np.load(file)) for split, file in files.items()}
    for number, (one,) in enumerate(tables(folder)["validation"].tolist()):
        similar = rows["train"] @ rows["validation"][number]
        assert one == NO_NEIGHBOUR or similar[one] >= np.sort(similar[similar <= 0.9])[-2]
    retrieve(folder, dataclasses.replace(request, held_out_embeddings=None), workers=1, reporter=SILENT)
    assert tables(folder).keys() == {"train"}
    with pytest.raises(DataError, match="no neighbours for its documents of the split 'validation'"):
        table_of(folder, "validation", of=identity_of(folder, manifest))
    np.save(files["train"], np.zeros((3, 3)))
    with pytest.raises(DataError, match=r"has the shape \(3, 3\)"):
        retrieve(folder, request, workers=1, reporter=SILENT)
    files["train"].write_text("no array")
    with pytest.raises(DataError, match="cannot be read"):
        retrieve(folder, request, workers=1, reporter=SILENT)
    np.save(files["train"], np.zeros((sizes["train"], 2)))
    with pytest.raises(DataError, match="has 3 columns"):
        retrieve(folder, request, workers=1, reporter=SILENT)
    with pytest.raises(UsageError, match="needs --embeddings"):
        retrieve(folder, RetrievalRequest(held_out_embeddings=files["train"]), workers=1, reporter=SILENT)


def test_a_composite_is_shown_and_tables_are_removed(folder: Path, tmp_path: Path) -> None:
    retrieve(folder, RetrievalRequest(columns=3, dimensions=32), workers=1, reporter=SILENT)
    plain = draw_sample(folder, 4, tmp_path / "plain", split="validation")
    shown = draw_sample(folder, 4, tmp_path / "shown", split="validation", neighbours=2)
    assert shown["neighbours"] == tables(folder)["validation"][4, :2].tolist()
    before = [draw_sample(folder, one, tmp_path / "one")["text"] for one in shown["neighbours"]]
    assert shown["text"].count("<s>") == 3
    assert shown["text"].endswith(plain["text"].split("[image")[0]) or shown["images"]
    assert shown["text"].startswith(before[0].split("[image")[0])
    assert shown["tokens"] == plain["tokens"] and plain["neighbours"] == []
    assert remove_neighbours(folder) and not remove_neighbours(folder)
    assert summary(folder)["neighbours"] is None
    with pytest.raises(DataError, match="has no neighbours"):
        draw_sample(folder, 4, tmp_path / "shown", neighbours=2)
