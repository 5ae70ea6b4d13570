# mmscale/data/documents/files.py against a server that speaks S3 (moto); needs `pip install s3fs 'moto[server]'`.
"""Tests of documents on S3."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmscale.data.documents import document_files as files
from mmscale.data.prepared.prepare import prepare
from tests.unit.data.samples import config, corpus, files_of

pytestmark = pytest.mark.exhaustive
s3fs = pytest.importorskip("s3fs")
server = pytest.importorskip("moto.server")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    host, port = running.get_host_and_port()
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("FSSPEC_S3_ENDPOINT_URL", f"http://{host}:{port}"),
    ):
        monkeypatch.setenv(name, value)
    import fsspec.config

    fsspec.config.set_conf_env(fsspec.config.conf)
    files._system.cache_clear()
    system = files._system("s3")
    if not system.exists("corpus"):  # moto's buckets outlive its servers
        system.mkdir("corpus")
    yield system
    files._system.cache_clear()
    fsspec.config.conf.clear()
    running.stop()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_data_set_of_a_bucket(tmp_path: Path, bucket: Any, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK", 1000)
    corpus(tmp_path / "in", 40)
    for file in (tmp_path / "in").rglob("*"):
        if file.is_file():
            bucket.pipe(f"corpus/web/{file.relative_to(tmp_path / 'in').as_posix()}", file.read_bytes())
    others: dict[str, Any] = {"part_documents": 7, "workers": workers}
    first = prepare(config(documents=["s3://corpus/web/*.jsonl"], **others), tmp_path / "there", progress=False)
    prepare(config(documents=[str(tmp_path / "in/docs.jsonl")], **others), tmp_path / "here", progress=False)
    here, there = (
        {name: data for name, data in files_of(tmp_path / name_).items() if name.endswith((".bin", ".idx", ".npy"))}
        for name_ in ("here", "there")
    )
    assert here == there and here and not first.rejected
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "there").rglob("*.bin")}
    prepare(config(documents=["s3://corpus/web/*.jsonl"], **others), tmp_path / "there", progress=False)
    assert times == {file: file.stat().st_mtime_ns for file in times}
    bucket.rm("corpus/web/img/3.png")
    assert prepare(config(documents=["s3://corpus/web/*.jsonl"], **others), tmp_path / "there", progress=False).rejected
