"""Facts of tables: those of a large split are kept, those of a small one are read whenever somebody asks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmscale.data.prepared import table_facts
from mmscale.data.prepared.manifest import read_manifest
from mmscale.errors import DataError
from tests.unit.data.corpora import corpus, document, prepare


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    documents = corpus(30)
    documents[17] = document(17, text=500, rng=np.random.default_rng(0))
    return prepare(tmp_path / "set", documents, parts=4, loss=[0b01] * 29 + [0b11])


def of(folder: Path, **options: Path) -> table_facts.TableFacts:
    return table_facts.table_facts(folder, read_manifest(folder), "train", **options)


def spoil(folder: Path) -> None:
    file = folder / "train-00002.meta.npy"
    table = np.load(file)
    table[0, 0] += 1
    np.save(file, table)


def test_facts_are_those_of_the_documents(folder: Path) -> None:
    tables = np.concatenate([np.load(file) for file in sorted(folder.glob("*.meta.npy"))])
    found = of(folder)
    assert (found.longest, found.where) == (tables[:, :2].sum(axis=1).max(), 17)
    assert found.labels == ((tables[:, 0] - 1).sum(), tables[29, 1])
    assert table_facts.longer_than(folder, read_manifest(folder), "train", tokens=500) == 1
    assert not list(folder.glob(".cache/facts-*"))


def test_a_small_split_is_checked_each_time(folder: Path) -> None:
    of(folder)
    spoil(folder)
    with pytest.raises(DataError, match="does not add up"):
        of(folder)


def test_facts_of_a_large_split_are_kept(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = of(folder)
    monkeypatch.setattr(table_facts, "LARGE", 10)
    assert of(folder) == expected
    assert of(folder, cache=tmp_path / "elsewhere") == expected
    assert list((tmp_path / "elsewhere").glob("facts-*.json"))
    with monkeypatch.context() as patch:
        patch.setattr(table_facts, "checked_table", lambda *_: pytest.fail("read again"))
        assert of(folder) == expected
    for damaged in ("{", "[]", '{"longest": 1, "where": 0, "labels": [1]}'):
        (file,) = (folder / ".cache").glob("facts-*.json")
        file.write_text(damaged)
        assert of(folder) == expected
    spoil(folder)  # other programs made this data: their tables are read again when they are written again
    with pytest.raises(DataError, match="does not add up"):
        of(folder)


def test_a_folder_that_cannot_be_written_is_no_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_facts, "LARGE", 10)
    (tmp_path / "file").write_text("")
    assert of(folder, cache=tmp_path / "file" / "below") == of(folder)
