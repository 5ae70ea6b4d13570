"""Work in a forked process: what it sends home, how it ends, and that it never outlives its parent."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch

from mmscale.checkpoint import forked
from mmscale.checkpoint.forked import Forked, Send
from mmscale.errors import CheckpointError
from tests.support import run_ranks

PATIENCE_S = 60.0


def ended(work: Any) -> Forked:
    task = Forked(work, name="the writer")
    assert task.wait(timeout_s=PATIENCE_S)
    assert not task.running
    with pytest.raises(ChildProcessError):
        os.waitpid(task.pid, os.WNOHANG)  # reaped
    return task


def test_messages_and_a_result_of_any_size_come_home() -> None:
    big = os.urandom(3 << 20)  # many times what a pipe holds

    def work(tell: Send) -> bytes:
        tell("begun")
        tell({"n": 1})
        return big

    task = ended(work)
    assert task.messages == ["begun", {"n": 1}] and task.result == big and task.problem is None


def test_a_snapshot_of_memory() -> None:
    values = torch.zeros(1_000_000)
    reading, writing = os.pipe()

    def work(tell: Send) -> float:
        os.read(reading, 1)  # not before the parent has changed them
        return float(values.sum())

    task = Forked(work, name="the writer")
    values.add_(1.0)
    os.write(writing, b"x")
    assert task.wait(timeout_s=PATIENCE_S) and task.result == 0.0
    os.close(reading)
    os.close(writing)


def fails_with(error: BaseException) -> Any:
    def work(tell: Send) -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "problem"),
    [
        (fails_with(OSError(28, "No space left on device", "/a/b")), "No space left on device: /a/b"),
        (fails_with(CheckpointError("it is damaged", remedy="go")), "it is damaged"),
        (fails_with(ValueError("no")), r"ValueError: no \(.*test_forked.py:\d+\)"),
        (lambda tell: os._exit(3), "the writer ended with exit status 3 and no result"),
        (lambda tell: os.kill(os.getpid(), signal.SIGKILL), "the writer was ended by SIGKILL"),
    ],
)
def test_every_end_has_a_reason(work: Any, problem: str) -> None:
    import re

    task = ended(work)
    assert task.result is None and task.problem is not None
    assert re.fullmatch(problem, task.problem), task.problem


def test_a_stopped_process_is_killed_and_requests_to_stop_do_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forked, "KILL_S", PATIENCE_S)
    task = Forked(lambda tell: os.kill(os.getpid(), signal.SIGSTOP), name="the writer")
    os.kill(task.pid, signal.SIGTERM)
    assert not task.wait(timeout_s=0.05)
    assert task.kill()
    assert task.problem == "the writer was ended by SIGKILL"


def test_it_ends_with_its_parent() -> None:
    reading, writing = os.pipe()

    def parent(ranks: Any) -> None:
        task = Forked(lambda tell: time.sleep(PATIENCE_S * 10), name="the writer")
        os.setpgid(task.pid, task.pid)  # or it would be ended with the rank's group
        os.write(writing, task.pid.to_bytes(4, "little"))
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(pytest.fail.Exception, match="SIGKILL"):
        run_ranks(parent, world_size=1)
    writer = int.from_bytes(os.read(reading, 4), "little")
    deadline = time.monotonic() + PATIENCE_S
    while _alive(writer):
        assert time.monotonic() < deadline, "the writer outlives its parent"
        time.sleep(0.002)
    os.close(reading)
    os.close(writing)


def _alive(pid: int) -> bool:
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
