"""Start ranks on this machine, forward signals to them, and end all of them when one dies.

`mmscale train --nproc N`: N rank processes on this machine, supervised together. No torch here. It does not restart
ranks (the launcher does) and does not span machines (SLURM, torchrun or mpirun do).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from mmscale.errors import LaunchError
from mmscale.runtime.rank_env import STORE_FD, listen, port_of

# Exit statuses of ranks that are passed on, so that scripts around the launcher receive them. Any other status is a
# crash.
DOCUMENTED_STATUSES = (2, 3, 4, 5, 74, 75)
# The signal that ranks get for each received signal. A closed terminal sends SIGHUP to this process only.
FORWARDED = {number: number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)} | {
    signal.SIGHUP: signal.SIGTERM
}
_POLL_S = 0.02
# Between SIGTERM and SIGKILL once a rank has died, and for other ranks to end by themselves after one ended with a
# documented exit status.
GRACE_S = 10.0
_TAIL_LINES = 20
_PR_SET_PDEATHSIG = 1


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    log: Path | None  # None for rank 0, whose output is not redirected
    status: int | None = None  # as from subprocess: negative for a signal


def run_local(
    nproc: int,
    argv: Sequence[str],
    *,
    log_dir: Path,
    environ: Mapping[str, str] | None = None,
    program: Sequence[str] = (sys.executable, "-m", "mmscale"),
) -> int:
    """Run one command as `nproc` ranks and wait for all of them.

    Rank 0 inherits stdout and stderr; rank R > 0 writes both to `log_dir/rank_R.log`. SIGTERM, SIGINT, SIGUSR1,
    SIGUSR2 and, as SIGTERM, SIGHUP are passed on to every rank, which then have as long as they need (they save); a
    second SIGINT ends them.

    Args:
        nproc: Number of ranks.
        argv: Arguments of the command, the same for each rank.
        log_dir: Folder of the logs, made if it is missing. One per attempt, or attempts overwrite each other.
        environ: Environment of the ranks; that of this process if None. The rank variables are added.
        program: What to run.

    Returns:
        0 if all ranks ended well, otherwise a documented exit status (2, 3, 4, 5, 74, 75) that a rank ended with.

    Raises:
        LaunchError: A rank died of a signal or with any other exit status. The tail of its log is on stderr by then.
    """
    with contextlib.suppress(OSError):  # `_log` reports it
        log_dir.mkdir(parents=True, exist_ok=True)
    ranks: list[_Rank] = []
    with _forwarding(ranks) as received:
        try:
            # Closed here after rank 0 has inherited it, so that no process listens on the port after rank 0 ends.
            with listen() as listener:
                shared = _shared_variables(os.environ if environ is None else environ, nproc, port=port_of(listener))
                for number in range(nproc):
                    # Not a comprehension: if the third rank cannot start, the first two must be in the list to be
                    # ended.
                    ranks.append(_start(number, [*program, *argv], shared, log_dir, listener=listener.fileno()))  # noqa: PERF401
            for signal_number in received:  # received while ranks were being started; later ones have not got it
                _send(ranks, signal_number)
            return _wait(ranks, received=received)
        finally:
            _end(ranks, grace_s=0.0)


def _shared_variables(environ: Mapping[str, str], nproc: int, *, port: int) -> dict[str, str]:
    variables = {name: value for name, value in environ.items() if name != STORE_FD}
    # Ranks share the cores, but torch would start a thread per core in each rank. GNU OpenMP's threads spin between
    # parallel regions, which takes more time than the work on a small machine.
    variables.setdefault("OMP_NUM_THREADS", "1")
    variables.setdefault("GOMP_SPINCOUNT", "0")
    if Path("/sys/class/net/lo").exists():
        # gloo would otherwise use the address of the host name, which many laptops and containers cannot resolve.
        variables.setdefault("GLOO_SOCKET_IFNAME", "lo")
    variables |= {
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "MMSCALE_LAUNCHER": "local",
    }
    return variables


def _start(number: int, command: list[str], shared: Mapping[str, str], log_dir: Path, *, listener: int) -> _Rank:
    first = number == 0
    own = {"RANK": str(number), "LOCAL_RANK": str(number)} | ({STORE_FD: str(listener)} if first else {})
    with contextlib.ExitStack() as files:
        output = _log(log_dir / f"rank_{number}.log") if number else None
        log = Path(files.enter_context(output).name) if output else None
        try:
            process = subprocess.Popen(
                command,
                env={**shared, **own},
                pass_fds=(listener,) if first else (),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                # A separate process group: Ctrl-C reaches only the launcher, which passes it on once, and the group can
                # be used to end processes that a rank leaves running.
                process_group=0,
                preexec_fn=_die_with(os.getpid()),
            )
        except OSError as error:
            raise LaunchError(f"rank {number} could not be started: {command[0]}: {error.strerror}") from error
    return _Rank(number, process, log)


def _log(file: Path) -> BinaryIO | None:
    """The log of a rank; None if the disk fails: then the rank's output is not redirected."""
    try:
        return file.open("wb")
    except OSError as error:
        sys.stderr.write(f"{file} cannot be written: {error.strerror}; that rank's output comes here\n")
        return None


def _die_with(parent: int) -> Callable[[], None]:
    """A function for the child that ends it together with the launcher, even if the launcher is killed with -9."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up before the fork, after which the child should do little

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the launcher died in between
            os._exit(1)

    return tie


@contextlib.contextmanager
def _forwarding(ranks: list[_Rank]) -> Iterator[list[int]]:
    """Pass signals on to the ranks. Yields the list of signals received so far."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set signal handlers
        return

    def forward(number: int, _: FrameType | None) -> None:
        passed = FORWARDED[signal.Signals(number)]
        received.append(passed)
        _send(ranks, passed)

    heard = [number for number in FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, forward) for number in heard}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _send(ranks: list[_Rank], number: int) -> None:
    for rank in _running(ranks):
        # Not Popen.send_signal(), which reaps a rank that has just ended; _poll() would then never see its status.
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank.process.pid, number)


def _wait(ranks: list[_Rank], *, received: list[int]) -> int:
    while True:
        ended = _poll(ranks)
        failed = [rank for rank in ended if rank.status != 0]
        if failed:
            break
        if all(rank.status == 0 for rank in ranks):
            return 0
        if received.count(signal.SIGINT) > 1:
            raise LaunchError("interrupted twice: ranks were ended without a save")
        time.sleep(_POLL_S)

    first = min(failed, key=_severity)
    if first.status in DOCUMENTED_STATUSES:
        # The ranks agreed to stop or all found the same error: give each of them time to report it.
        _wait_until(lambda: not _running(ranks), ranks, GRACE_S)
        crashed = [rank for rank in ranks if rank.status not in (None, 0, *DOCUMENTED_STATUSES)]
        first = crashed[0] if crashed else first
    _end(ranks, grace_s=GRACE_S)
    assert first.status is not None
    if -first.status in received:
        name = signal.Signals(-first.status).name
        raise LaunchError(
            f"stopped by {name} before rank {first.number} could handle it: nothing was saved",
            remedy="start it again: it continues from the newest checkpoint, if there is one",
        )
    if first.status not in DOCUMENTED_STATUSES:
        _print_tail(first)
        raise LaunchError(
            f"rank {first.number} of {len(ranks)} {_how_it_ended(first)}; the other ranks were ended",
            remedy=f"its log is {first.log}" if first.log else "its output is above",
        )
    if ranks[0].status != first.status:  # rank 0 did not print it on the terminal
        _print_tail(first)
    return first.status


def _running(ranks: list[_Rank]) -> list[_Rank]:
    return [rank for rank in ranks if rank.status is None]


def _poll(ranks: list[_Rank]) -> list[_Rank]:
    """Collect the ranks that have ended since the last call, and end processes that they left running."""
    ended = []
    for rank in _running(ranks):
        # Without reaping first: as long as the zombie exists, no other process can get its process group's id.
        if os.waitid(os.P_PID, rank.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            continue
        _signal_group(rank, signal.SIGKILL)
        rank.status = rank.process.wait()
        ended.append(rank)
    return ended


def _wait_until(done: Callable[[], bool], ranks: list[_Rank], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        _poll(ranks)
        time.sleep(_POLL_S)


def _end(ranks: list[_Rank], *, grace_s: float) -> None:
    _poll(ranks)
    if grace_s > 0 and _running(ranks):
        _send(ranks, signal.SIGTERM)
        _wait_until(lambda: not _running(ranks), ranks, grace_s)
    for rank in _running(ranks):
        _signal_group(rank, signal.SIGKILL)
    _wait_until(lambda: not _running(ranks), ranks, 10.0)


def _signal_group(rank: _Rank, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(rank.process.pid, number)


def _severity(rank: _Rank) -> tuple[int, int]:
    """Sort key of ranks found dead in one poll: a killed rank is the cause, lost connections of others the effect."""
    status = rank.status or 0
    return (0 if status < 0 else 2 if status in DOCUMENTED_STATUSES else 1, rank.number)


def _how_it_ended(rank: _Rank) -> str:
    status = rank.status or 0
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = "a signal"
    return f"was ended by {name} ({-status})"


def _print_tail(rank: _Rank) -> None:
    if rank.log is None:
        return
    with rank.log.open("rb") as log:
        log.seek(max(0, rank.log.stat().st_size - 64 * 1024))
        lines = log.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
    sys.stderr.write("\n".join([f"--- last lines of {rank.log}", *lines, "---", ""]))
    sys.stderr.flush()
