"""Attempts of a run whose ranks are killed: forked ranks of `mmscale train`, which a test may end in any way."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from mmscale.resilience.inject import VARIABLE
from tests.end_to_end.running import fork_all

PATIENCE_S = 300.0


@dataclass
class Life:
    """One attempt of forked ranks, each in a separate process group together with its children.

    Attributes:
        statuses: exit statuses by rank, negative for a signal.
        said: stderr of rank 0, at the end.
    """

    arguments: list[str]
    nproc: int = 2
    faults: str = ""
    statuses: dict[int, int] = field(default_factory=dict)
    said: str = ""

    def __post_init__(self) -> None:
        import mmscale.train.run  # noqa: F401  what forks would import one by one

        self._folder = Path(tempfile.mkdtemp(prefix="mmscale-life-"))
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = self.faults
        try:
            self.pids = fork_all(self.arguments, self.nproc, self._folder)
        finally:
            del os.environ[VARIABLE]
            if before is not None:
                os.environ[VARIABLE] = before
        for pid in self.pids:
            os.setpgid(pid, pid)

    def send(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all of them at once; to the ranks alone, not to their writers."""
        for other, pid in enumerate(self.pids):
            if rank in (None, other) and other not in self.statuses:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def hears(self, number: int) -> bool:
        """Whether every living rank has a handler for this signal; before that the signal kills it."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.statuses:
                with contextlib.suppress(FileNotFoundError):
                    caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
                    if caught is not None and not int(caught[1], 16) >> (number - 1) & 1:
                        return False
        return True

    def poll(self) -> bool:
        """Whether any rank is alive."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.statuses and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                self.statuses[rank] = os.waitstatus_to_exitcode(ended[1])
        return len(self.statuses) < self.nproc

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds, or until all ranks have ended."""
        deadline = time.monotonic() + PATIENCE_S
        while self.poll() and not condition():
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.002)

    def end(self) -> dict[int, int]:
        """Wait for the end of all ranks; ranks that are alive after the limit are killed, which is an error.

        When a rank is lost the launcher ends the others; this helper gives them time to notice by themselves.
        """
        deadline = time.monotonic() + PATIENCE_S
        while self.poll():
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                raise AssertionError(f"ranks hang: {self.statuses}")
            time.sleep(0.002)
        said = self._folder / "0.err"  # a rank may be killed before it opens the file
        self.said = said.read_text() if said.exists() else ""
        shutil.rmtree(self._folder)
        return self.statuses

    def left_behind(self) -> list[int]:
        """Processes that the ranks have started and that are still alive after them, after a moment for the kernel."""
        deadline = time.monotonic() + PATIENCE_S
        while alive := [pid for pid in psutil.pids() if _group(pid) in self.pids]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.002)
        return alive


def _group(pid: int) -> int | None:
    try:
        if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return None
        return os.getpgid(pid)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return None
