"""The lock of a run.

Ensures one trainer per run, however and wherever it is started: takes the run's lease, refuses while its holder is
alive, and keeps the heartbeat. lease.py defines the file and the checks of ranks. No torch.

If the holder's process is visible (same boot of the same machine, same PID namespace), its state is known at once.
Otherwise a second starter watches the holder's counter for some seconds. Clocks and host names are never compared, and
no `flock` is needed: over NFS, `link` is atomic.

Every lease has a random token. Only one process can succeed a lease, because it has to create a link named after the
token; so of two that start at the same time one is refused.

    with RunLock(run, by="train") as lock:
        lock.acquire("train-1", attempt=3)      # HeldError: another process trains it
        ...                                  # heartbeats in a thread; released at the end
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType

from mmscale.errors import LaunchError, shell_command
from mmscale.resilience.lease import BEAT_S, LEASE, SILENT_S, Lease, beat, encode, inode, owner, read, release
from mmscale.runtime.processes import Process

_LOOK_S = 0.5
_STALLED_S = 3.0  # a read that took so long shows nothing about the holder: the file system stood still for both
_NOBODY = "nobody"
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class HeldError(LaunchError):
    """Another process trains the run and is alive."""


def refuse_held(run: Path, *, job: str = "", known_dead: Collection[str] = ()) -> None:
    """Refuse to start while a holder is alive; takes nothing.

    Waits for up to `SILENT_S` if only the counter can show it.

    Args:
        run: the run's folder, or that of a stage.
        job: of SLURM, that asks: its own earlier starts are over.
        known_dead: ids of attempts that have ended according to SLURM.

    Raises:
        HeldError: the holder is alive.
        LaunchError: the lease cannot be read.
    """
    held = _current(run)[0]
    if held is not None and not held.released:
        _refuse_living(run, held, lambda: owner(run), job=job, known_dead=known_dead)


def acquire(
    run: Path,
    lease_id: str,
    *,
    attempt: int,
    job: str = "",
    by: str = "launch",
    known_dead: Collection[str] = (),
) -> Lease:
    """Make an attempt the owner of a run.

    Args:
        run: its folder.
        lease_id: of the attempt; unique.
        attempt: its number.
        job: of SLURM; it may take the run from its own earlier starts, as a process may from itself.
        by: "train" or "launch".
        known_dead: as for `refuse_held`.

    Raises:
        HeldError: another one owns it and is alive.
        LaunchError: the lease cannot be read or written.
    """
    run.mkdir(parents=True, exist_ok=True)
    while True:
        held, tokens = _current(run)
        if held is not None and not held.released:
            _refuse_living(run, held, lambda: _current(run)[0], job=job, known_dead=known_dead)
        lease = Lease(
            lease_id,
            attempt,
            job,
            socket.gethostname(),
            Process.this(),
            by=by,
            time=round(time.time(), 3),
            token=secrets.token_hex(8),
            folder=inode(run),
        )
        try:
            if _succeed(run, lease, tokens):
                return lease
        except OSError as error:
            raise LaunchError(
                f"{run / LEASE} cannot be written: {error.strerror}",
                remedy="nothing can be trained here until that is mended",
            ) from None


def holder_lives(run: Path, held: Lease) -> bool | None:
    """Whether the holder of a lease is alive; None if only its counter can show it."""
    lives = held.process.lives()
    if not held.process.boot and held.host == socket.gethostname():  # taken by an older version
        with contextlib.suppress(OSError):
            return Process.of(held.process.pid) is not None
    if lives and not held.is_of(run):  # this folder is a copy of the holder's
        return None
    return lives


# --- whether the holder lives ---------------------------------------------------------------------------------------


def _refuse_living(
    run: Path, held: Lease, again: Callable[[], Lease | None], *, job: str, known_dead: Collection[str]
) -> None:
    """Return if the lease may be taken over, or no longer belongs to this holder.

    Raises:
        HeldError: the holder is alive.
    """
    if (job and held.job == job) or held.process == Process.this() or held.id in known_dead:
        return
    first, began, announced = held, time.monotonic(), False
    while True:
        lives = holder_lives(run, held)
        if lives:
            raise _held(run, held)
        ending = lives is False and held.writer is not None and bool(held.writer.lives())
        if lives is False and not ending:
            return
        if time.monotonic() - began > SILENT_S:
            if ending:
                raise _held(run, held, saving=True)
            return
        if not announced and time.monotonic() - began > 2 * BEAT_S:
            announced = True
            what = "for its ranks to save and end" if ending else "for a sign of life"
            sys.stderr.write(f"{run} was held by {_who(held)}: waiting up to {SILENT_S:.0f} s {what}\n")
        before = time.monotonic()
        time.sleep(_LOOK_S)
        found = again()
        if time.monotonic() - before > _STALLED_S:
            began = time.monotonic()
        if found is None or found.token != first.token:
            return  # released, or taken by another one: the caller decides again
        if not ending and found.beat != first.beat:
            raise _held(run, found)
        held = found


def _who(held: Lease) -> str:
    return f"process {held.process.pid} on {held.host}" + (f" of job {held.job}" if held.job else "")


def _held(run: Path, held: Lease, *, saving: bool = False) -> HeldError:
    if saving and held.writer is not None:
        return HeldError(
            f"{run}: rank 0 of a launch that was killed still saves and ends (process {held.writer.pid})",
            remedy="start again when it has ended",
        )
    here = "" if held.process.runs_on_this_host or held.job else f" on {held.host}"
    return HeldError(
        f"{run} is being trained by {_who(held)}", remedy=f"{shell_command('stop', run)}{here} has it save and end"
    )


# --- taking it ------------------------------------------------------------------------------------------------------


def _claim(run: Path, token: str) -> Path:
    """The path of the link that the only successor of a lease creates."""
    return run / f".{LEASE}.after.{token}"


def _current(run: Path) -> tuple[Lease | None, list[str]]:
    """The newest lease, published or claimed by a process that has not published it yet, and the tokens up to it."""
    held = read(run / LEASE)
    tokens = [held.token if held is not None else _NOBODY]
    while (claimed := read(_claim(run, tokens[-1]))) is not None:
        held = claimed
        tokens.append(claimed.token)
    return held, tokens


def _succeed(run: Path, lease: Lease, tokens: list[str]) -> bool:
    """Become the successor of the newest lease; False: another process was faster.

    Raises:
        OSError: the file system refuses it.
    """
    temporary, claim = run / f".{LEASE}.{lease.token}", _claim(run, tokens[-1])
    try:
        temporary.write_bytes(encode(lease))
        if not _link(temporary, claim):
            return False
        published = read(run / LEASE)
        if (published.token if published is not None else _NOBODY) != tokens[0]:
            claim.unlink(missing_ok=True)  # the lease that this would succeed was over before the link was made
            return False
        temporary.replace(run / LEASE)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    for token in tokens:
        _claim(run, token).unlink(missing_ok=True)
    return True


def _link(source: Path, target: Path) -> bool:
    """Make `target` with the content of `source`, unless it is there."""
    try:
        target.hardlink_to(source)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        try:
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "wb") as file:
            file.write(source.read_bytes())
    return True


# --- holding it -----------------------------------------------------------------------------------------------------


class RunLock:
    """This process's hold on a run: sends heartbeats while entered, and releases the run at the end.

    A heartbeat that cannot be written, on a full or frozen disk, does not lose the lease: it is retried.

    Args:
        run: the run's folder.
        job: of SLURM.
        by: "train" or "launch".

    Attributes:
        lease: the lease that it holds; None before `acquire`.
        keep: do not release the run at the end, because SLURM restarts this job.
    """

    def __init__(self, run: Path, *, job: str = "", by: str = "train") -> None:
        self.run, self.job, self.by = run, job, by
        self.lease: Lease | None = None
        self.keep = False
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, lease_id: str, *, attempt: int, known_dead: Collection[str] = ()) -> Lease:
        """`run_lock.acquire`, with heartbeats from then on; again for the next attempt of the same process."""
        self.lease = acquire(self.run, lease_id, attempt=attempt, job=self.job, by=self.by, known_dead=known_dead)
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
            self._thread.start()
        return self.lease

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * BEAT_S)  # the file system may be frozen
        if self.lease is not None and not self.keep:
            release(self.run, self.lease.id)

    def _beat(self) -> None:
        number = 0
        while not self._ended.wait(BEAT_S):
            number += 1
            lease = self.lease
            assert lease is not None
            try:
                beat(self.run, lease, number)
            except FileNotFoundError:
                self._restore(lease)
            except (OSError, ValueError, TypeError, AttributeError, KeyError):
                continue

    def _restore(self, lease: Lease) -> None:
        """The file was removed: write it again, unless another process has taken the run since."""
        temporary = self.run / f".{LEASE}.{lease.token}"
        try:
            temporary.write_bytes(encode(lease))
            _link(temporary, self.run / LEASE)
        except OSError:
            return
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
