# mmscale/data/documents/files.py: files on object stores are read as local ones are, in blocks, and tried again.
"""Tests of document files behind URLs; fsspec's memory is the store. A real S3 server: test_s3_documents.py."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmscale.data.documents import document_files as files
from mmscale.data.documents.document_files import RemoteFile
from mmscale.data.documents.readers import list_files, list_local, scan_files
from mmscale.data.documents.schema import Document, Rejected
from mmscale.data.prepared.prepare import prepare
from mmscale.errors import DataError
from tests.unit.data.documents.test_reader_faults import pairs, tar
from tests.unit.data.samples import config, corpus, files_of, image

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def store() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK", 700)
    monkeypatch.setattr(files, "PAUSE", 0.0)


def put(store: Any, folder: Path, prefix: str = "/data") -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            store.pipe(f"{prefix}/{file.relative_to(folder).as_posix()}", file.read_bytes())


@pytest.mark.parametrize("kind", ["remote", "local"])
@pytest.mark.parametrize("change", ["other content", "gone and back", "the same"])
def test_a_file_that_changes_while_it_is_read_is_not_mixed_in(
    tmp_path: Path, store: Any, kind: str, change: str
) -> None:
    file = corpus(tmp_path / "in", 20)
    put(store, file.parent)
    named = str(file) if kind == "local" else "memory://data/docs.jsonl"
    first, second = scan_files(list_files([named]), slice_records=10)
    assert len(list(first.read())) == 10
    if change != "the same":
        content = file.read_bytes()
        content = content.replace(b"number", b"NUMBER") if change == "other content" else content
        file.write_bytes(content)
        store.rm("/data/docs.jsonl")
        store.pipe("/data/docs.jsonl", content)
        with pytest.raises(DataError, match=r"docs\.jsonl has changed while it was read"):
            list(second.read())
    else:
        assert len(list(second.read())) == 10


def read(pattern: str, *, slice_records: int = 7) -> list[Document | Rejected]:
    parts = scan_files(list_files([pattern]), slice_records=slice_records)
    return [one for part in pickle.loads(pickle.dumps(parts)) for one in part.read()]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "tar", "parquet"])
def test_every_format_is_read_as_from_a_file_system(tmp_path: Path, store: Any, kind: str) -> None:
    file = tmp_path / f"a.{kind}"
    if kind == "tar":
        tar(file, pairs(20))
    elif kind == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({"content": [[{"type": "text", "text": f"{n}"}] for n in range(30)]}), file)
    else:
        lines = corpus(tmp_path, 20).read_bytes()
        file.write_bytes(gzip.compress(lines) if kind.endswith("gz") else lines)
    put(store, tmp_path)
    here, there = read(str(file)), read(f"memory://data/a.{kind}")
    assert len(there) >= 20 and all(isinstance(one, Document) for one in there)
    for one, other in zip(here, there, strict=True):
        assert isinstance(one, Document) and isinstance(other, Document)
        assert (one.id, one.where, len(one.content)) == (other.id, other.where, len(other.content))
        for mine, its in zip(one.images, other.images, strict=True):
            assert its.source == (mine.source.read_bytes() if isinstance(mine.source, Path) else mine.source)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_data_set_of_a_store(tmp_path: Path, workers: int) -> None:
    """Worker processes open the store themselves, so that it is one that they share."""
    corpus(tmp_path / "in", 30)
    others: dict[str, Any] = {"part_documents": 7, "workers": workers}
    url = f"local://{tmp_path}/in/*.jsonl"
    prepare(config(documents=[url], **others), tmp_path / "there", progress=False)
    prepare(config(documents=[str(tmp_path / "in/docs.jsonl")], **others), tmp_path / "here", progress=False)
    here, there = (
        {name: data for name, data in files_of(tmp_path / name_).items() if name.endswith((".bin", ".idx", ".npy"))}
        for name_ in ("here", "there")
    )
    assert here == there and here


@pytest.mark.usefixtures("small_blocks")
def test_fetches_are_tried_again_and_then_given_up(tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, corpus(tmp_path, 20).parent)
    fetch, failures = type(store).cat_file, iter([True, True, False, True] + [False] * 1000)

    def flaky(self: Any, *arguments: Any, **options: Any) -> bytes:
        if next(failures):
            raise ConnectionResetError("the store hung up")
        return fetch(self, *arguments, **options)

    monkeypatch.setattr(type(store), "cat_file", flaky)
    assert len(read("memory://data/docs.jsonl")) == 20
    monkeypatch.setattr(type(store), "cat_file", lambda *_, **__: (_ for _ in ()).throw(TimeoutError("no answer")))
    with pytest.raises(DataError, match=r"memory://data/docs\.jsonl cannot be read: no answer"):
        read("memory://data/docs.jsonl")


def test_seeks_and_reads_over_blocks(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK", 100)
    content = os.urandom(1234)
    store.pipe("/a.bin", content)
    with RemoteFile("memory://a.bin", len(content), "1").open() as stream:
        assert stream.read() == content
        for at, size in ((0, 1), (99, 2), (700, 300), (1200, 99), (5, 0), (1234, 5)):
            stream.seek(at)
            assert stream.read(size) == content[at : at + size]


def test_a_file_that_changes_while_it_is_read(store: Any) -> None:
    store.pipe("/a.bin", b"x" * 50)
    with RemoteFile("memory://a.bin", 80, "1").open() as stream, pytest.raises(OSError, match="has changed"):
        stream.read()


@pytest.mark.parametrize("path", ["../secret.png", "/secret.png", "memory://secret.png", "a/../../secret.png"])
def test_items_do_not_leave_the_folder(store: Any, path: str) -> None:
    store.pipe("/secret.png", b"secret")
    store.pipe("/data/a.jsonl", json.dumps({"content": [image(path)]}).encode())
    (one,) = read("memory://data/a.jsonl")
    assert isinstance(one, Rejected) and "leaves the folder" in one.reason


def test_missing_files(store: Any) -> None:
    for name in ("memory://none.jsonl", "memory://none/*.jsonl"):
        with pytest.raises(DataError, match="there is no document file memory"):
            list_files([name])
    store.pipe("/data/a.jsonl", b'{"content": [{"type": "image", "path": "no.png"}]}\n')
    (one,) = read("memory://data/a.jsonl")
    assert isinstance(one, Rejected) and one.reason == "image no.png is missing"
    with pytest.raises(DataError, match=r"nosuch:// (is not known|needs a package)"):
        list_files(["nosuch://a.jsonl"])
    with pytest.raises(DataError, match="is a URL"):
        list_local(["memory://data/a.jsonl"])
