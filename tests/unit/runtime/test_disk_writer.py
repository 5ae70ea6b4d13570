"""Records are written when the disk takes them: what callers see while it refuses, and what is in the files."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmscale.errors import LaunchError
from mmscale.runtime import disk_writer
from mmscale.runtime.disk_writer import GOOD, REFUSED, Appended, DiskWriter, replacing


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_writer, "RETRY_S", 0.02)


class Heard:
    """What a writer announces."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.said: list[str] = []

    def __call__(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))

    def writer(self, **options: Any) -> DiskWriter:
        return DiskWriter("the disk", on_change=self, say=self.said.append, **options)

    def until(self, event: str) -> dict[str, Any]:
        """Wait for an announcement."""
        deadline = time.monotonic() + 60
        while not (found := [fields for name, fields in self.events if name == event]):
            assert time.monotonic() < deadline, self.events
            time.sleep(0.005)
        return found[0]


def refusing(number: int, healthy: threading.Event, done: Callable[[], None]) -> Callable[[], None]:
    """An action whose disk refuses it until it is healthy."""

    def action() -> None:
        if not healthy.is_set():
            raise OSError(number, os.strerror(number), "metrics.jsonl")
        done()

    return action


def test_a_line_is_in_the_file_when_the_call_returns(tmp_path: Path) -> None:
    file = tmp_path / "new" / "metrics.jsonl"
    writer = Heard().writer()
    lines = Appended(file, writer)
    for number in range(20):
        lines.append(b"%d\n" % number)
        assert file.read_bytes().count(b"\n") == number + 1
    assert writer.close() == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE])
def test_what_a_disk_refuses_is_kept_in_order_and_written_later(number: int) -> None:
    heard, healthy, written = Heard(), threading.Event(), []
    writer = heard.writer()
    for line in range(50):
        writer.submit(refusing(number, healthy, lambda line=line: written.append(line)), size=10)  # type: ignore[misc]
    assert written == [] and writer.refuses
    assert heard.events == [(REFUSED, {"place": "the disk", "reason": f"{os.strerror(number)}: metrics.jsonl"})]
    healthy.set()
    good = heard.until(GOOD)
    assert written == list(range(50)) and (good["kept"], good["lost"]) == (50, 0)
    writer.submit(lambda: written.append(50), size=10)
    assert written[-1] == 50 and [name for name, _ in heard.events] == [REFUSED, GOOD]  # once each
    assert len(heard.said) == 2 and "Training continues" in heard.said[0] and "50 records kept" in heard.said[1]


def test_a_disk_that_hangs_costs_one_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_writer, "WAIT_S", 0.2)
    heard, thawed, written = Heard(), threading.Event(), []
    writer = heard.writer()
    began = time.monotonic()
    writer.submit(thawed.wait, size=1)
    assert time.monotonic() - began >= 0.2
    began = time.monotonic()
    for line in range(1000):
        writer.submit(lambda line=line: written.append(line), size=1)  # type: ignore[misc]
    assert time.monotonic() - began < 60.0 and written == []  # not 0.2 s for each
    assert heard.events[0] == (REFUSED, {"place": "the disk", "reason": "no answer for 0.2 s"})
    thawed.set()
    assert heard.until(GOOD)["kept"] == 1001 and written == list(range(1000))


def test_memory_is_bounded_and_what_is_lost_is_counted() -> None:
    heard, healthy, written = Heard(), threading.Event(), []
    writer = heard.writer(limit=100)
    for line in range(15):
        writer.submit(refusing(errno.ENOSPC, healthy, lambda line=line: written.append(line)), size=10)  # type: ignore[misc]
    healthy.set()
    good = heard.until(GOOD)
    assert written == list(range(10)) and (good["kept"], good["lost"]) == (10, 5)
    assert "5 are lost" in heard.said[-1]


def test_of_a_files_contents_only_the_newest_waits(tmp_path: Path) -> None:
    heard, healthy = Heard(), threading.Event()
    writer = heard.writer()
    file = tmp_path / "status.json"
    writer.submit(refusing(errno.ENOSPC, healthy, lambda: None), size=1)
    for number in range(9):
        writer.submit(replacing(file, b"%d" % number), size=1, key=str(file))
    healthy.set()
    assert heard.until(GOOD)["kept"] == 2
    assert file.read_bytes() == b"8" and [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


def test_the_end_waits_for_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_writer, "CLOSE_S", 0.1)
    heard = Heard()
    writer = heard.writer()
    writer.submit(refusing(errno.EROFS, threading.Event(), lambda: None), size=1)
    writer.submit(lambda: None, size=1)
    began = time.monotonic()
    assert writer.close() == 2
    assert time.monotonic() - began < 60.0 and "2 records could not be written" in heard.said[-1]


def test_other_errors_reach_the_caller() -> None:
    """A fenced process must not write any more, and hears so from the line that it tried or from the next one."""
    heard, healthy = Heard(), threading.Event()
    writer = heard.writer()

    def fenced() -> None:
        raise LaunchError("another attempt owns the run")

    with pytest.raises(LaunchError):
        writer.submit(fenced, size=1)
    writer.submit(refusing(errno.ENOSPC, healthy, lambda: None), size=1)
    writer.submit(fenced, size=1)  # nobody waits for it
    healthy.set()
    heard.until(GOOD)
    with pytest.raises(LaunchError):
        writer.submit(lambda: None, size=1)
    writer.submit(lambda: None, size=1)


def test_a_torn_line_is_ended_and_a_part_of_a_line_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n{"st')
    heard = Heard()
    lines = Appended(file, heard.writer())
    write, room = os.write, [3]

    def small(number: int, data: bytes) -> int:
        return write(number, data[: room.pop()] if room and len(data) > 1 else data)

    monkeypatch.setattr(os, "write", small)
    lines.append(b'{"step": 2}\n')  # three bytes of it fit at first
    heard.until(GOOD)
    lines.append(b'{"step": 3}\n')
    assert file.read_bytes() == b'{"step": 1}\n{"st\n{"step": 2}\n{"step": 3}\n'
