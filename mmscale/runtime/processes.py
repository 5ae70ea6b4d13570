"""Identifies processes beyond their PID, so that a reused PID is not mistaken for the old process.

A PID alone is not a permanent name, because it may be given to another process later. No torch.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from dataclasses import dataclass
from pathlib import Path

_ENDED = ("Z", "X", "x")  # states in /proc/PID/stat of a process that has ended and is not reaped


@dataclass(frozen=True)
class Process:
    """A process, possibly of another machine or container.

    Attributes:
        pid: its number in its PID namespace.
        started: when it was started [clock ticks since the machine booted]; field 22 of /proc/PID/stat, proc(5).
        boot: id of that boot, unique among machines and boots; "": unknown.
        namespace: its PID namespace; "": unknown.
    """

    pid: int = 0
    started: int = 0
    boot: str = ""
    namespace: str = ""

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """A process that is visible here; None if it does not exist."""
        found = _stat(pid)
        return None if found is None else cls(pid, found[1], _boot(), _namespace())

    @classmethod
    def this(cls) -> Process:
        """The calling process."""
        return cls.of(os.getpid()) or cls(os.getpid())

    @property
    def runs_on_this_host(self) -> bool:
        """Whether its PID is valid here: the same boot of the same machine, and the same namespace."""
        return bool(self.boot and self.namespace) and (self.boot, self.namespace) == (_boot(), _namespace())

    def lives(self) -> bool | None:
        """Whether it runs; None if that cannot be found out here."""
        if not self.runs_on_this_host:
            return None
        try:
            found = _stat(self.pid)
        except OSError:  # /proc hides the processes of other users
            return None
        return found is not None and found[1] == self.started and found[0] not in _ENDED

    def children(self) -> list[Process]:
        """The processes that it has started, if it and they are alive and visible here."""
        if not self.lives():
            return []
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                if entry.name.isdigit() and int(_fields(int(entry.name))[1]) == self.pid:
                    found.append(Process.of(int(entry.name)))
        return [process for process in found if process is not None]

    def send(self, number: signal.Signals) -> bool:
        """Send it a signal, but never to another process with the same PID.

        Returns:
            Whether the process existed.

        Raises:
            PermissionError: it belongs to another user.
        """
        if not self.runs_on_this_host:
            return False
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:  # the descriptor refers to the process that has the PID now, which cannot change any more
            if not self.lives():
                return False
            signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(descriptor)
        return True


def _stat(pid: int) -> tuple[str, int] | None:
    """State and start time of a process; None if there is no such process.

    Raises:
        OSError: it exists, but this user may not read them.
    """
    try:
        fields = _fields(pid)
    except (FileNotFoundError, ProcessLookupError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        raise
    return fields[0], int(fields[19])


def _fields(pid: int) -> list[str]:
    """State, parent, ... of a process: the fields after its name, which may contain any characters."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


@functools.cache
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
