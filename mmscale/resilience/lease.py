# Which attempt owns a run's folder: lease.json, taken by who starts ranks, looked at by every rank before it writes.
# It starts and stops nothing, asks no scheduler, and imports no torch.
"""Fencing of old attempts.

A cluster may believe a node dead whose processes live on, start the job elsewhere, and so have two attempts write into
one folder (seen with SLURM when slurmd dies and its ranks do not). The launcher gives every attempt an id (job, restart
count, number of the start within it) and writes it into the folder before ranks start; a rank that finds another id
there ends without writing anything more.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mmscale.errors import LaunchError

LEASE = "lease.json"
VARIABLE = "MMSCALE_ATTEMPT_ID"  # what the launcher tells its ranks


class FencedError(LaunchError):
    """Another attempt has taken over; this one must not write."""


@dataclass(frozen=True)
class Lease:
    """Who owns a run.

    Attributes:
        id: of the attempt; no two are equal.
        attempt: its number in the run, as in metrics.jsonl.
        job: of SLURM; "" for ranks of one machine.
        host, pid: the process that started the ranks.
        time: when it was taken [seconds since 1970].
    """

    id: str
    attempt: int
    job: str = ""
    host: str = ""
    pid: int = 0
    time: float = 0.0


def take(run: Path, lease_id: str, *, attempt: int, job: str = "") -> Lease:
    """Make an attempt the owner of a run; whoever was loses it."""
    lease = Lease(lease_id, attempt, job, socket.gethostname(), os.getpid(), round(time.time(), 3))
    run.mkdir(parents=True, exist_ok=True)
    _write(run, lease)
    return lease


def _write(run: Path, lease: Lease) -> None:
    temporary = run / f".{LEASE}.{socket.gethostname()}.{os.getpid()}"
    temporary.write_text(json.dumps(asdict(lease)) + "\n")
    temporary.replace(run / LEASE)


def renew(run: Path, lease_id: str, *, attempt: int) -> None:
    """Give one's own lease the number of another attempt.

    Raises:
        FencedError: another attempt owns the run.
    """
    found = owner(run)
    if found is None or found.id != lease_id:
        raise FencedError(f"{run} belongs to attempt {found.id if found else 'nobody'} now, and not to {lease_id}")
    _write(run, replace(found, attempt=attempt))


def owner(run: Path) -> Lease | None:
    """The attempt that owns a run; None if no launcher ever started one."""
    try:
        found = json.loads((run / LEASE).read_text())
        return Lease(**{name: found[name] for name in Lease.__dataclass_fields__ if name in found})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError) as error:
        raise LaunchError(f"{run / LEASE} cannot be read: {error}", remedy="remove it if nothing runs there") from None


def release(run: Path, lease_id: str) -> None:
    """Give a run up, if it is still one's own."""
    found = owner(run)
    if found is not None and found.id == lease_id:
        (run / LEASE).unlink(missing_ok=True)


def launched_attempt(run: Path, environ: Mapping[str, str] = os.environ) -> int | None:
    """The number that the launcher of this process gave its attempt; None: there is no launcher, or it lost the run."""
    found = owner(run) if environ.get(VARIABLE) else None
    return found.attempt if found is not None and found.id == environ[VARIABLE] else None


class Fence:
    """Asks whether this process may still write.

    Args:
        run: The run's folder.
        lease_id: This attempt; None: nobody started it with a lease, and nothing is ever asked.
        every_s: `look` reads the file no more often than this [seconds]; thousands of ranks share a file system.
    """

    def __init__(self, run: Path, lease_id: str | None, *, every_s: float = 1.0) -> None:
        self.run = run
        self.lease_id = lease_id
        self.every_s = every_s
        self._looked = -every_s

    @classmethod
    def of_rank(cls, run: Path, rank: int, environ: Mapping[str, str] = os.environ) -> Fence:
        """The fence of a rank, by what its launcher told it."""
        return cls(run, environ.get(VARIABLE) or None, every_s=1.0 if rank == 0 else 10.0)

    def look(self) -> None:
        """`check`, now and then: for every step.

        Raises:
            FencedError: another attempt owns the run.
        """
        if self.lease_id is not None and time.monotonic() - self._looked >= self.every_s:
            self.check()

    def check(self) -> None:
        """Called before anything is written that a later attempt would read.

        Raises:
            FencedError: another attempt owns the run.
        """
        if self.lease_id is None:
            return
        self._looked = time.monotonic()
        found = owner(self.run)
        if found is None or found.id != self.lease_id:
            raise FencedError(
                f"{self.run} belongs to attempt {found.id if found else 'nobody'} now; this one, {self.lease_id}, ends"
            )
