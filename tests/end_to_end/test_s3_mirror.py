"""Mirrors in a real S3 server on loopback: moto's, spoken to by s3fs. Skips where these are not installed. To run it:

    python3.11 -m venv S3 && S3/bin/pip install uv
    S3/bin/uv pip install --python S3/bin/python -c constraints.txt -e '.[dev]'
    S3/bin/uv pip install --python S3/bin/python s3fs==2026.9.0 aiobotocore==3.10.0 'moto[s3,server]==5.2.5'
    S3/bin/python -m pytest -m exhaustive tests/end_to_end/test_s3_mirror.py

pip's own resolver searches for minutes among versions of botocore; uv does it in seconds.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoints_tools import mirrors
from mmscale.checkpoint import integrity
from mmscale.checkpoint.integrity import MANIFEST, CheckpointManifest
from mmscale.checkpoint.layout import INFO, Store, info_text
from mmscale.checkpoint.mirror.downloads import generations
from mmscale.checkpoint.mirror.mirror_settings import MirrorSettings
from mmscale.checkpoint.mirror.remote import Remote
from mmscale.checkpoint.mirror.upload_process import UploadProcess, wait_for
from mmscale.checkpoint.save_settings import Retention
from mmscale.errors import CheckpointError

pytestmark = pytest.mark.exhaustive
pytest.importorskip("s3fs", reason="s3fs is not installed")
server = pytest.importorskip("moto.server", reason="moto[s3,server] is not installed")

URL = "s3://bucket/runs/one"
SECRET = "a-secret-of-the-test"
LARGE = 12 << 20  # bytes: more than one part of an upload in parts


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    one = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    one.start()
    host, port = one.get_host_and_port()
    yield f"http://{host}:{port}"
    one.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty bucket, with credentials in the environment as a job has them."""
    import s3fs

    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    store = s3fs.S3FileSystem()
    store.mkdir("bucket")
    yield store
    store.invalidate_cache()
    store.rm("bucket", recursive=True)


def commit(store: Store, step: int) -> Path:
    folder = store.begin(step, 1)
    for name, size in {"__0_0.distcp": LARGE, "__1_0.distcp": 1000, "empty": 0}.items():
        (folder / name).write_bytes(random.Random(f"{step}{name}").randbytes(size))
    (store.temporary(step, 1) / INFO).write_text(
        info_text({"step": step, "attempt": 1, "config": {"run": {"dir": "x", "name": "one"}}})
    )
    files = integrity.digests(folder, integrity.sizes(folder))
    return store.commit(CheckpointManifest(step, 1, "", "", {}, files))


class Told:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))


def process(store: Store, told: Told, **others: Any) -> UploadProcess:
    settings = MirrorSettings(URL, store.root, Retention(2), **others)
    return UploadProcess(settings, on_event=told, warn=lambda text: None)


def there() -> list[int]:
    return [one.step for one in generations(Remote(URL))]


def test_upload_keep_and_fetch(bucket: Any, tmp_path: Path) -> None:
    store, told = Store.of_run(tmp_path / "one"), Told()
    paths = {step: commit(store, step) for step in (100, 200, 300)}
    one = process(store, told)
    one.finish()
    assert wait_for(one, within_s=900), told.events
    assert there() == [200, 300]
    commit(store, 400)
    one.finish()
    assert wait_for(one, within_s=900), told.events
    assert there() == [300, 400]
    keys = [key for key in bucket.find("bucket") if key.endswith(MANIFEST)]
    assert len(keys) == 2 and SECRET not in repr(told.events)
    done = mirrors.fetch(URL, 300, tmp_path / "two")["fetched"][0]
    assert integrity.verify(Path(done["path"]), step=300) == []
    assert (Path(done["path"]) / "__0_0.distcp").read_bytes() == (paths[300] / "__0_0.distcp").read_bytes()


def test_killed_in_the_middle_of_a_file(bucket: Any, tmp_path: Path) -> None:
    """Uploads in parts that were begun and not completed are no files; nothing loads, and the next process ends it."""
    store, told = Store.of_run(tmp_path / "one"), Told()
    commit(store, 100)
    slow = process(store, told, bandwidth=4e6, streams=1)
    slow.request_upload()
    assert slow._process is not None
    until = time.monotonic() + 900
    while not _parts(bucket):
        assert time.monotonic() < until
        time.sleep(0.1)
    os.kill(slow._process.pid, signal.SIGKILL)
    while slow.busy:
        time.sleep(0.1)
    assert there() == []
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        mirrors.fetch(URL, None, tmp_path / "two")
    assert not Store.of_run(tmp_path / "two").steps()
    again = process(store, told)
    again.finish()
    assert wait_for(again, within_s=900), told.events
    assert there() == [100]
    assert mirrors.fetch(URL, None, tmp_path / "two")["fetched"][0]["step"] == 100


def _parts(bucket: Any) -> int:
    """Parts of uploads that are not completed."""
    found = bucket.call_s3("list_multipart_uploads", Bucket="bucket")
    return len(found.get("Uploads", []))


def test_a_bucket_that_is_not_there_is_not_made(bucket: Any, tmp_path: Path) -> None:
    store, told = Store.of_run(tmp_path / "one"), Told()
    commit(store, 100)
    one = UploadProcess(
        MirrorSettings("s3://other/runs/one", store.root, Retention(2)), on_event=told, warn=lambda text: None
    )
    one.request_upload()
    until = time.monotonic() + 900
    while not told.events:
        assert time.monotonic() < until
        one.poll()
        time.sleep(0.1)
    one.close()
    assert told.events[0][0] == "mirror_failed" and not bucket.exists("other")
