# mmscale/data/stream/source.py: documents come back as they were written, and damage is found and named.
"""Tests of the reader of prepared data."""

from __future__ import annotations

import gc
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from mmscale.data.stream import source as source_module
from mmscale.data.stream.source import Source
from mmscale.errors import DataError
from tests.unit.data.corpora import THREE, VOCABULARY, corpus, document, prepare


@pytest.fixture
def documents() -> list[np.ndarray]:
    return corpus(23)


@pytest.fixture
def folder(tmp_path: Path, documents: list[np.ndarray]) -> Path:
    return prepare(tmp_path / "set", documents, parts=4)


def open_source(folder: Path, split: str = "train") -> Source:
    return Source(folder, split=split, vocabulary=VOCABULARY)


def test_documents_come_back_across_parts(folder: Path, documents: list[np.ndarray]) -> None:
    source = open_source(folder)
    assert len(source) == len(documents)
    order = np.random.default_rng(1).permutation(len(documents))
    np.testing.assert_array_equal(source.read(order), np.concatenate([documents[n] for n in order]))
    np.testing.assert_array_equal(source.lengths, [len(ids) for ids in documents])
    np.testing.assert_array_equal(
        source.rows(np.arange(len(documents))).counts[:, 1], [(ids >= 100).sum() for ids in documents]
    )
    assert source.read(np.zeros(0, np.int64)).shape == (0,)


def test_tokens_outlive_the_source_and_few_parts_stay_open(
    folder: Path, documents: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "OPEN_PARTS", 1)
    source = open_source(folder)
    first = source.read(np.array([0]))
    everything = source.read(np.arange(len(documents)))
    assert len(source._open) == 1
    del source
    gc.collect()
    np.testing.assert_array_equal(first, documents[0])  # a view would be a segmentation fault here
    np.testing.assert_array_equal(everything, np.concatenate(documents))


def test_a_pickled_source_reads_the_same(folder: Path) -> None:
    source = open_source(folder)
    expected = source.read(np.arange(len(source)))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source)).read(np.arange(len(source))), expected)


def test_loss_bits_and_first_tokens_decide_label_counts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = document(0, text=3, images=1, rng=rng)
    source = open_source(prepare(tmp_path / "set", [ids, ids, ids, ids], loss=[0b11, 0b01, 0b10, 0b00], parts=1))
    text, image = (ids < 100).sum(), (ids >= 100).sum()
    np.testing.assert_array_equal(
        source.rows(np.arange(4)).labels, [[text - 1, image], [text - 1, 0], [0, image], [0, 0]]
    )


def test_identity_follows_the_documents(tmp_path: Path) -> None:
    documents = corpus(10)
    same = [open_source(prepare(tmp_path / name, documents)).identity for name in ("a", "b")]
    other = open_source(prepare(tmp_path / "c", documents[::-1])).identity
    assert same[0] == same[1] != other


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_truncated_part_is_named(folder: Path, suffix: str) -> None:
    file = folder / f"train-00002{suffix}"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(DataError, match=rf"train-00002\{suffix} has \d+ bytes instead of \d+"):
        open_source(folder)


# megatron's IndexedDataset complains in __del__ when its __init__ failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_garbled_index_is_named(folder: Path) -> None:
    file = folder / "train-00001.idx"
    file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(DataError, match=r"train-00001\.idx or \.bin cannot be read"):
        open_source(folder).read(np.arange(23))


def test_an_index_of_other_documents_is_named(tmp_path: Path, folder: Path, documents: list[np.ndarray]) -> None:
    rotated = prepare(tmp_path / "other", documents[1:] + documents[:1], parts=4)
    size = (folder / "train-00000.idx").stat().st_size
    assert (rotated / "train-00000.idx").stat().st_size == size
    (folder / "train-00000.idx").write_bytes((rotated / "train-00000.idx").read_bytes())
    with pytest.raises(DataError, match="disagree about lengths"):
        open_source(folder).read(np.array([0]))


def test_a_table_that_does_not_add_up_is_named(folder: Path) -> None:
    file = folder / "train-00003.meta.npy"
    table = np.load(file)
    table[0, 0] += 1
    np.save(file, table)
    with pytest.raises(DataError, match=r"train-00003\.meta\.npy does not add up"):
        open_source(folder)


def test_a_document_must_start_with_text(tmp_path: Path) -> None:
    folder = prepare(tmp_path / "set", [np.arange(100, 110)], parts=1)
    with pytest.raises(DataError, match="without a text token"):
        open_source(folder)


def test_missing_split_empty_split_and_other_vocabulary(folder: Path) -> None:
    with pytest.raises(DataError, match="no split 'test', only train, validation"):
        open_source(folder, "test")
    with pytest.raises(DataError, match=r"'validation' .* has no documents"):
        open_source(folder, "validation")
    with pytest.raises(DataError, match="another vocabulary"):
        Source(folder, split="train", vocabulary=THREE)


def test_a_missing_folder_or_manifest_is_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        open_source(tmp_path / "nowhere")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest)[:-5])
    with pytest.raises(DataError, match="is damaged"):
        open_source(folder)
