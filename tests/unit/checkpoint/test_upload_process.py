"""The process that uploads checkpoints: it ends with its parent, tries again, and never delays a save."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mmscale.checkpoint.layout import Store
from mmscale.checkpoint.mirror.mirror_settings import MirrorSettings
from mmscale.checkpoint.mirror.remote import Remote
from mmscale.checkpoint.mirror.upload_process import UploadProcess, wait_for
from mmscale.checkpoint.save_settings import Retention
from tests.unit.checkpoint.test_mirror import bring, commit, steps


class Recorder:
    """Events and warnings of an uploading process."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.warnings: list[str] = []

    def __call__(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))

    def names(self) -> list[str]:
        return [name for name, _ in self.events]


def process(store: Store, url: str, recorder: Recorder, **others: Any) -> UploadProcess:
    return UploadProcess(
        MirrorSettings(url, store.root, Retention(2), **others), on_event=recorder, warn=recorder.warnings.append
    )


def test_the_process_uploads_and_ends(store: Store, remote: Remote) -> None:
    commit(store, 100)
    recorder = Recorder()
    one = process(store, remote.url, recorder)
    one.request_upload()
    assert wait_for(one, within_s=300)
    commit(store, 200)
    one.request_upload()
    one.finish()
    assert wait_for(one, within_s=300)
    one.close()
    assert recorder.names() == ["mirror_uploaded"] * 2 and [fields["step"] for _, fields in recorder.events] == [
        100,
        200,
    ]
    assert steps(remote) == [100, 200] and recorder.warnings == []


def test_the_process_takes_no_module_of_the_working_directory(
    store: Store, remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('not the standard library')")
    monkeypatch.chdir(tmp_path)
    commit(store, 100)
    recorder = Recorder()
    one = process(store, remote.url, recorder)
    one.request_upload()
    one.finish()
    assert wait_for(one, within_s=300)
    one.close()
    assert recorder.names() == ["mirror_uploaded"] and steps(remote) == [100]


def test_the_process_dies_with_its_parent(store: Store, remote: Remote, tmp_path: Path) -> None:
    """A killed trainer leaves no upload behind that could meet the one of the next attempt."""
    commit(store, 100)
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from mmscale.checkpoint.mirror.mirror_settings import *\n"
        "from mmscale.checkpoint.mirror.upload_process import *\n"
        f"s = MirrorSettings({remote.url!r}, Path({str(store.root)!r}), Retention(2), 2000.0)\n"
        "p = UploadProcess(s, on_event=print, warn=print); p.request_upload()\n"
        "print(p._process.pid, flush=True); time.sleep(100)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    until = time.monotonic() + 300
    while not remote.folders() and time.monotonic() < until:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes():
        assert time.monotonic() < until, "it outlives its parent"
        time.sleep(0.05)
    assert steps(remote) == []
    assert bring(store, remote) == [100]


def test_a_killed_process_is_started_again_at_the_next_save(store: Store, remote: Remote) -> None:
    commit(store, 100)
    recorder = Recorder()
    one = process(store, remote.url, recorder, bandwidth=1000.0)
    one.request_upload()
    assert one._process is not None
    os.kill(one._process.pid, 9)
    until = time.monotonic() + 300
    while one.busy:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert recorder.names() == ["mirror_failed"] and len(recorder.warnings) == 1
    one.settings = MirrorSettings(remote.url, store.root, Retention(2))
    one.finish()
    assert wait_for(one, within_s=300)
    assert steps(remote) == [100]


def test_a_store_that_is_away_is_tried_until_it_is_back(store: Store, tmp_path: Path) -> None:
    """A file where the folder should be; the user is warned once."""
    commit(store, 100)
    place = tmp_path / "mirror"
    place.write_text("in the way")
    recorder = Recorder()
    one = process(store, f"file://{place}/one", recorder)
    one.request_upload()
    until = time.monotonic() + 300
    while recorder.names().count("mirror_failed") < 2:
        assert time.monotonic() < until and one.busy
        time.sleep(0.02)
    place.unlink()
    assert wait_for(one, within_s=300)
    one.close()
    assert recorder.names()[-1] == "mirror_uploaded" and len(recorder.warnings) == 1
    pauses = [fields["retry_s"] for name, fields in recorder.events if name == "mirror_failed"]
    assert pauses[:2] == [1.0, 2.0]


def test_requests_never_wait(store: Store, remote: Remote) -> None:
    """A process that reads nothing: the pipe fills up, and saves go on."""
    recorder = Recorder()
    one = process(store, remote.url, recorder)
    one.request_upload()
    assert one._process is not None
    os.kill(one._process.pid, 19)  # SIGSTOP
    done = threading.Event()
    threading.Thread(target=lambda: ([one.request_upload() for _ in range(20_000)], done.set()), daemon=True).start()
    assert done.wait(300)
    one._process.kill()
    one.close()
