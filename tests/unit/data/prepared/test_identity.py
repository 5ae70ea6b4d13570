"""Data is known by its documents: a folder that moved is the same, one that was filled anew is not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mmscale.data.prepared.identity import SourceIdentity, compare, identity_of, known, match, same_documents
from mmscale.data.prepared.manifest import read_manifest
from tests.unit.data.corpora import corpus, prepare


def of(folder: Path) -> str:
    return identity_of(folder, read_manifest(folder))


def test_content_and_not_the_path(tmp_path: Path) -> None:
    documents = corpus(40)
    first = of(prepare(tmp_path / "first", documents))
    shutil.copytree(tmp_path / "first", tmp_path / "moved")
    assert of(tmp_path / "moved") == first
    assert of(prepare(tmp_path / "reordered", documents[::-1])) != first
    assert of(prepare(tmp_path / "other", corpus(40, seed=1))) != first
    assert of(prepare(tmp_path / "masked", documents, loss=[1] * 40)) != first
    assert of(prepare(tmp_path / "held", documents, split="validation")) != first


def source(path: str, identity: str = "", weight: float = 1.0) -> SourceIdentity:
    return SourceIdentity(path=path, weight=weight, identity=identity or path)


A, B, C = source("a"), source("b"), source("c")


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ([A], [A], []),
        ([A, B], [A, B], []),
        ([A], [source("a", "z")], ["data: a holds other documents"]),
        ([A, B], [A], ["data: b is left out"]),
        ([A], [A, B], ["data: b is new"]),
        ([A, B], [B, A], ["data: another order, now b, a"]),
        ([A, B], [A, source("b", weight=3.0)], ["share of a: 0.5 -> 0.25", "share of b: 0.5 -> 0.75"]),
        ([A, B], [source("a", weight=2.0), source("b", weight=2.0)], []),
        ([A, B], [A, C], ["data: b is left out", "data: c is new"]),
    ],
)
def test_what_makes_it_other_data(old: list[SourceIdentity], new: list[SourceIdentity], lines: list[str]) -> None:
    found, moved = compare(old, new)
    assert [line.removeprefix("data: ") for line in found] == [line.removeprefix("data: ") for line in lines]
    assert moved == []


def test_a_moved_folder_is_the_same_data() -> None:
    assert compare([A, B], [source("x", "a"), B]) == ([], ["data: a -> x, the same documents"])


def test_equal_documents_twice() -> None:
    """Of two equal sets each keeps its own path."""
    twice = [source("a", "z"), source("b", "z")]
    assert match(twice, twice[::-1]) == [(1, 0), (0, 1)]
    assert match(twice, [source("c", "z")]) == [(0, 0)]


def test_checkpoints_from_before_it_was_kept() -> None:
    assert known({}) is None
    assert known({"data": [A.model_dump()]}) == [A]


@pytest.mark.parametrize(("new", "same"), [
    ([A, B], True),
    ([source("moved", "a"), B], True),
    ([A, B.model_copy(update={"max_epochs": 2})], True),  # held-out documents are read once in any case
    ([A], False),
    ([A, source("c", "other")], False),
    ([A, B.model_copy(update={"weight": 9.0})], False),
])  # fmt: skip
def test_held_out_losses_are_comparable_on_the_same_documents(new: list[SourceIdentity], same: bool) -> None:
    assert same_documents([A, B], new) is same
