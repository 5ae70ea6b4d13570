"""Fencing of old attempts.

Which attempt owns a run's folder: lease.json, checked by every rank before it writes. run_lock.py decides who may take
it and keeps the holder's heartbeat. No torch.

A cluster may declare a node dead while its processes are still alive, start the job elsewhere, and so have two attempts
write into one folder (seen with SLURM when slurmd dies and its ranks do not). Every attempt has an id (job, restart
count, number of the start within it), which is in lease.json before ranks start. A rank that finds another id there
ends without writing anything more.

The file has a fixed size. Its owner rewrites it in place, through a descriptor from which the owner has just read its
own id; a new owner replaces the file. So a late write goes to a file that nobody reads any more, and a full disk does
not stop the heartbeat counter. A released lease stays in place, marked as released, so that fenced attempts stay
fenced.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mmscale import bounded
from mmscale.errors import LaunchError
from mmscale.runtime.processes import Process

LEASE = "lease.json"
VARIABLE = "MMSCALE_ATTEMPT_ID"  # variable through which the launcher passes the id to its ranks
BEAT_S = 2.0  # between two heartbeats of a holder
SILENT_S = 20.0  # a holder on another machine counts as dead after this time without a heartbeat
ORPHANED_S = 60.0  # longer for its own ranks, which have more to lose
_WIDTH = 1000  # bytes before the heartbeat counter
_BEAT = '"beat": "'
_DIGITS = 20
_TRIES, _PAUSE_S = 4, 0.2
_DAMAGED = (ValueError, TypeError, AttributeError, KeyError)  # errors of `decode`

# Interval between a rank's checks [seconds]: rank 0, which writes logs; the first rank of each node; others.
RANK_0_S, NODE_S, OTHERS_S = 1.0, 10.0, 60.0


class FencedError(LaunchError):
    """Another attempt has taken over; this one must not write."""


@dataclass(frozen=True)
class Lease:
    """The owner of a run.

    Attributes:
        id: of the attempt; unique.
        attempt: its number in the run, as in metrics.jsonl.
        job: of SLURM; "" for ranks of one machine.
        host: of the holder, for messages.
        process: the holder, which started the ranks or is rank 0 itself.
        writer: rank 0 below a launcher, once it has started: it may outlive the holder while it saves.
        by: "train" or "launch".
        time: when it was taken [seconds since 1970].
        token: random; unique for every taking.
        folder: inode of the run's folder: a copy of the folder has another one.
        released: it was released.
        beat: counter that increases while the holder is alive.
    """

    id: str
    attempt: int
    job: str = ""
    host: str = ""
    process: Process = field(default_factory=Process)
    writer: Process | None = None
    by: str = ""
    time: float = 0.0
    token: str = ""
    folder: int = 0
    released: bool = False
    beat: int = 0

    def is_of(self, run: Path) -> bool:
        """Whether it was taken in this folder, and not in the original of a copy."""
        return self.folder == inode(run)


def encode(lease: Lease) -> bytes:
    """The content of the file; every lease has the same number of bytes."""
    content = asdict(lease)
    del content["beat"]
    text = json.dumps(content)[:-1] + ","
    assert len(text) <= _WIDTH, text
    return f'{text.ljust(_WIDTH)}{_BEAT}{lease.beat:0{_DIGITS}d}"}}\n'.encode()


def decode(content: bytes) -> Lease:
    """Parses the output of `encode` or of older versions.

    Raises:
        ValueError, TypeError, AttributeError, KeyError: it is not a lease.
    """
    found: dict[str, Any] = bounded.parse_json(content)
    for name in ("process", "writer"):
        if found.get(name) is not None:
            found[name] = Process(**found[name])
    if "pid" in found:  # written by an older version, which stored only the PID
        found["process"] = Process(found["pid"])
    found["beat"] = int(found.get("beat", 0))
    return Lease(**{name: found[name] for name in Lease.__dataclass_fields__ if name in found})


def inode(run: Path) -> int:
    """Distinguishes a folder from a copy of it; 0 if the folder does not exist."""
    try:
        return run.stat().st_ino
    except OSError:
        return 0


def changed(run: Path) -> float:
    """Time of the last write of the lease, by the clock of the file system [seconds since 1970]."""
    return (run / LEASE).stat().st_mtime


def read(file: Path) -> Lease | None:
    """The lease in a file, released or not; None if there is none.

    Raises:
        PermissionError: this user may not read it.
        LaunchError: it cannot be read, even after retries.
    """
    for left in reversed(range(_TRIES)):
        try:
            return decode(file.read_bytes())
        except FileNotFoundError:
            return None
        except PermissionError:
            raise
        except OSError as error:  # a stale handle or a network error does not show who owns the run
            if not left:
                raise LaunchError(f"{file} cannot be read: {error.strerror}", remedy="try again") from None
        except _DAMAGED as error:  # possibly being written at this moment
            if not left:
                raise LaunchError(f"{file} cannot be read: {error}", remedy="remove it if nothing runs there") from None
        time.sleep(_PAUSE_S)
    raise AssertionError


def owner(run: Path) -> Lease | None:
    """The attempt that owns a run; None if there is none.

    Raises:
        PermissionError, LaunchError: as `read`.
    """
    found = read(run / LEASE)
    return None if found is None or found.released else found


@contextlib.contextmanager
def _opened(run: Path, mine: Callable[[Lease], bool]) -> Iterator[tuple[int, Lease | None]]:
    """The file, opened for its owner, and the lease in it; None instead if it belongs to another attempt."""
    descriptor = os.open(run / LEASE, os.O_RDWR)
    try:
        found = decode(os.pread(descriptor, 2 * _WIDTH, 0))
        yield descriptor, (found if mine(found) else None)
    finally:
        os.close(descriptor)


def _change(run: Path, lease_id: str, **fields: Any) -> None:
    """Change one's own lease in place.

    Raises:
        FencedError: another attempt owns the run.
        LaunchError: it cannot be written, even after retries.
    """
    for left in reversed(range(_TRIES)):
        try:
            with _opened(run, lambda found: found.id == lease_id and not found.released) as (descriptor, found):
                if found is not None:
                    os.pwrite(descriptor, encode(replace(found, **fields))[:_WIDTH], 0)
                    return
                break
        except FileNotFoundError:
            break
        except (OSError, *_DAMAGED) as error:
            if not left:
                raise LaunchError(f"{run / LEASE} cannot be written: {error}", remedy="try again") from None
        time.sleep(_PAUSE_S)
    held = owner(run)
    raise FencedError(f"{run} belongs to attempt {held.id if held else 'nobody'} now, and not to {lease_id}")


def renew(run: Path, lease_id: str, *, attempt: int) -> None:
    """Change the attempt number of this process's lease.

    Raises:
        FencedError: another attempt owns the run.
        LaunchError: it cannot be written, even after retries.
    """
    _change(run, lease_id, attempt=attempt)


def join(run: Path, lease_id: str) -> None:
    """Record this process as the writer below the holder, if the lease is one's own and can be written."""
    with contextlib.suppress(LaunchError):
        _change(run, lease_id, writer=Process.this())


def release(run: Path, lease_id: str) -> None:
    """Release the run, if the lease is still one's own.

    If the disk fails, the end of the holder's process has the same effect.
    """
    with contextlib.suppress(LaunchError, OSError):
        _change(run, lease_id, released=True)


def beat(run: Path, lease: Lease, number: int) -> bool:
    """Increase the counter; returns whether the file exists and still holds this lease.

    Raises:
        OSError, ValueError, TypeError, AttributeError, KeyError: it cannot be read or written, which does not show who
            owns the run.
    """
    with _opened(run, lambda found: found.token == lease.token) as (descriptor, found):
        if found is None:
            return False
        try:
            os.pwrite(descriptor, f"{number:0{_DIGITS}d}".encode(), _WIDTH + len(_BEAT))
        except OSError:  # a copy-on-write file system may be full
            os.utime(descriptor)
        return True


def launched_attempt(run: Path, environ: Mapping[str, str] = os.environ) -> int | None:
    """The attempt number from the launcher of this process; None if there is no launcher, or it has lost the run."""
    found = owner(run) if environ.get(VARIABLE) else None
    return found.attempt if found is not None and found.id == environ[VARIABLE] else None


class Fence:
    """Checks whether this process may still write, and whether the holder of its lease is alive.

    Only a lease of another attempt ends a process; a missing or unreadable lease does not.

    Args:
        run: The run's folder.
        lease_id: This attempt; None: started without a lease, and nothing is ever checked.
        every_s: Minimum interval between reads of the file by `look` [seconds]; thousands of ranks share a file system.
    """

    def __init__(self, run: Path, lease_id: str | None, *, every_s: float = 1.0) -> None:
        self.run = run
        self.lease_id = lease_id
        self.every_s = every_s
        self._looked = -every_s
        self._found: Lease | None = None
        self._sign: tuple[object, ...] = ()  # of life
        self._sign_at = time.monotonic()

    @classmethod
    def of_rank(cls, run: Path, rank: int, environ: Mapping[str, str] = os.environ, *, local_rank: int = 0) -> Fence:
        """The fence of a rank, from the environment set by its launcher.

        Ranks of one node lose the run together, and a rank cannot continue for long after its neighbour has ended. So
        the first rank of a node checks often, and the others rarely.
        """
        every_s = RANK_0_S if rank == 0 else NODE_S if local_rank == 0 else OTHERS_S
        return cls(run, environ.get(VARIABLE) or None, every_s=every_s)

    def check_if_due(self) -> None:
        """`check` at limited intervals, for every step.

        Raises:
            FencedError: another attempt owns the run.
        """
        if self.lease_id is not None and time.monotonic() - self._looked >= self.every_s:
            self.check()

    def check(self) -> None:
        """Called before writing anything that a later attempt would read.

        Raises:
            FencedError: another attempt owns the run.
        """
        if self.lease_id is None:
            return
        try:
            found = read(self.run / LEASE)
        except (LaunchError, OSError):
            return
        finally:
            self._looked = time.monotonic()
        if found is not None and found.id != self.lease_id:
            raise FencedError(f"{self.run} belongs to attempt {found.id} now; this one, {self.lease_id}, ends")
        self._found = found
        sign = (None,) if found is None else (found.token, found.beat, found.attempt)
        if sign != self._sign:
            self._sign, self._sign_at = sign, self._looked

    def is_orphaned(self) -> bool:
        """Whether the holder of the lease had died at the last check.

        Then no process handles the end of this attempt, and the next start may take over the run.
        """
        if self.lease_id is None or not self._sign:
            return False
        if self._found is not None:
            if self._found.released:
                return True
            lives = self._found.process.lives()
            if lives is not None:
                return not lives
        return self._looked - self._sign_at > ORPHANED_S
