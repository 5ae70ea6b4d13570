# What is left when a preparation is killed, interrupted or refused its storage, and what the next one makes of it.
"""Accidents in preparing a data set."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mmscale.data.prepared.manifest import read_manifest
from mmscale.errors import DataError
from tests.unit.data.prepared.test_prepare import quiet
from tests.unit.data.samples import config, corpus, files_of, text, write_jsonl

CHILD = """
import sys
from pathlib import Path
from tests.unit.data.samples import config
from mmscale.data.prepared.prepare import prepare
from mmscale.errors import DataError
try:
    prepare(config(documents=[sys.argv[1]], part_documents=4, workers=2), Path(sys.argv[2]))
except DataError as error:
    sys.exit(str(error))
"""
ACCIDENT_DOCUMENTS = 400


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """Documents, and the data set that an undisturbed run makes of them."""
    folder = tmp_path_factory.mktemp("undisturbed")
    file = corpus(folder / "in", ACCIDENT_DOCUMENTS)
    quiet(config(documents=[str(file)], part_documents=4), folder / "out")
    return file, files_of(folder / "out")


@contextlib.contextmanager
def running(file: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    here = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": str(here.parents[3])}
    command = [sys.executable, "-c", CHILD, str(file), str(out)]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def workers_of(pid: int) -> list[int]:
    """The pool's processes."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.name))
    return [child for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def done(out: Path) -> int:
    return len(list(out.glob("done/*.json")))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


MOMENTS: dict[str, Callable[[Path], object]] = {
    "begun": lambda out: (out / "source.json").exists(),
    "tokenizers": lambda out: (out / "image_tokenizer").exists(),
    "half-written part": lambda out: list(out.glob("train/*.tmp")),
    "some parts": lambda out: done(out) > 20,
    "all parts": lambda out: done(out) == ACCIDENT_DOCUMENTS // 4,
}


SHORT = ("half-written part", "all parts")  # in `make test`


@pytest.mark.parametrize(
    "moment", [name if name in SHORT else pytest.param(name, marks=pytest.mark.long) for name in MOMENTS]
)
def test_killed_at_any_moment(moment: str, undisturbed: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    file, expected = undisturbed
    out = tmp_path / "out"
    with running(file, out) as process:
        wait_for(lambda: MOMENTS[moment](out), process)
        children = workers_of(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode in (-signal.SIGKILL, 0)  # 0: the machine was faster than the test
    deadline = time.monotonic() + 60
    while any(alive(child) for child in children):  # no worker goes on writing behind the next run's back
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if not (out / "manifest.json").exists():
        with pytest.raises(DataError, match="is not a prepared data set"):
            read_manifest(out)
    for finished in out.glob("done/*.json"):  # what counts as done is whole
        for name, size in json.loads(finished.read_text())["sizes"].items():
            assert (out / name).stat().st_size == size
    kept = {path: path.stat().st_mtime_ns for path in out.glob("done/*.json")}
    quiet(config(documents=[str(file)], part_documents=4), out)
    assert files_of(out) == expected
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())


def test_dead_worker_is_reported(undisturbed: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    file, expected = undisturbed
    out = tmp_path / "out"
    with running(file, out) as process:
        wait_for(lambda: done(out), process)
        os.kill(workers_of(process.pid)[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 1 and "a worker process died" in errors and "run the same command again" in errors
    assert not (out / "manifest.json").exists() and not list(out.rglob("*.tmp"))
    quiet(config(documents=[str(file)], part_documents=4), out)
    assert files_of(out) == expected


@pytest.mark.usefixtures("signals_heard")
def test_interrupt(undisturbed: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    file, _ = undisturbed
    for attempt in range(20):
        out = tmp_path / f"out{attempt}"
        with running(file, out) as process:
            wait_for(functools.partial(done, out), process)
            process.send_signal(signal.SIGINT)
            process.wait(timeout=300)
        if not (out / "manifest.json").exists():
            break  # else it was done before the signal came
    assert process.returncode != 0
    assert not (out / "manifest.json").exists() and not list(out.rglob("*.tmp"))


@contextlib.contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file may grow beyond `limit` bytes: writing fails in the middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("limit", "workers"), [(100, 1), (3_000, 1), (20_000, 1), pytest.param(20_000, 2, marks=pytest.mark.long)]
)
def test_write_that_fails(tmp_path: Path, limit: int, workers: int) -> None:
    """100 bytes: not even source.json; 3,000: no tokenizer; 20,000: some parts."""
    records = [{"id": str(n), "content": [text("abcdefgh" * 20 * (20 if n > 90 else 1))]} for n in range(100)]
    file = write_jsonl(tmp_path / "d.jsonl", records)
    settings = config(documents=[str(file)], part_documents=20, workers=workers, vocab={"text": 262, "image": 16})
    out = tmp_path / "out"
    with small_files(limit), pytest.raises(DataError, match="could not be written: File too large") as caught:
        quiet(settings, out)
    assert "free some space and run the same command again" in caught.value.remedy
    assert not list(out.rglob("*.tmp")) and not (out / "manifest.json").exists()
    quiet(settings, out)
    quiet(settings, tmp_path / "fresh")
    assert files_of(out) == files_of(tmp_path / "fresh")


def test_full_disk(undisturbed: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    file, expected = undisturbed
    disk = tmp_path / "disk"
    disk.mkdir()
    # 100 parts of at most 6 files and a record, a page each, need 2 MB
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small disk")
    try:
        out = disk / "out"
        with pytest.raises(DataError, match="could not be written: No space left on device"):
            quiet(config(documents=[str(file)], part_documents=4), out)
        assert done(out) > 0 and not list(out.rglob("*.tmp")) and not (out / "manifest.json").exists()
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        quiet(config(documents=[str(file)], part_documents=4), out)
        assert files_of(out) == expected
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="could not be written: Not a directory"):
        quiet(config(documents=[str(corpus(tmp_path / "in", 4))]), tmp_path / "file/out")
