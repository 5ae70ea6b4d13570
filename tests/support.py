# Distributed tests that read like any other: `@distributed(world_size=4)` forks ranks of the test function.
# For gloo on one machine only; tests of the real launchers start real processes.
"""Support for tests with several ranks.

    @distributed(world_size=2)
    def test_sum(ranks, tmp_path):
        groups.initialize(ranks, tp=2)
        ...

The ranks are forks of a parent that has imported torch and megatron-core, so a test takes about half a second where a
spawned one takes a minute. A rank's failure is the test's failure, with its traceback; the others are stopped.
`pytest.skip` in a rank skips the test. What a rank prints is shown when the test fails.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import inspect
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mmscale.runtime.rank_env import RankEnv

_PR_SET_PDEATHSIG = 1
_NOISE = re.compile(
    r'^  File ".*(/_pytest/|/pytest/__main__|/pluggy/|<frozen runpy>|/tests/support\.py)|^Extension modules: '
)
_OK, _FAILED, _SKIPPED = 0, 1, 77


@dataclass(frozen=True)
class Ranks(RankEnv):
    """A RankEnv whose ranks meet in a file, so that no port can be taken."""

    rendezvous: str = ""

    @property
    def init_method(self) -> str:
        return f"file://{self.rendezvous}"


def distributed(world_size: int, *, timeout_s: float = 300.0) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test function once per rank, in forked processes.

    Args:
        world_size: Number of ranks.
        timeout_s: Seconds after which all ranks are ended; the test's error then shows where each of them was.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def test(*args: Any, **kwargs: Any) -> None:
            run_ranks(functools.partial(function, *args, **kwargs), world_size=world_size, timeout_s=timeout_s)

        # pytest reads the arguments to pass (fixtures, parametrize) from the signature: all but `ranks`.
        test.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[parameter for name, parameter in signature.parameters.items() if name != "ranks"]
        )
        return test

    return decorate


def run_ranks(function: Callable[..., None], *, world_size: int, timeout_s: float = 300.0) -> None:
    """Call `function(ranks=...)` in `world_size` forked processes. Fails or skips the test as a direct call would."""
    _import_what_ranks_need()
    folder = Path(tempfile.mkdtemp(prefix="mmscale-ranks-"))
    pids: dict[int, int] = {}  # pid -> rank
    statuses: dict[int, int] = {}  # rank -> exit status, negative for a signal
    timed_out = False
    try:
        for rank in range(world_size):
            sys.stdout.flush()
            sys.stderr.flush()
            parent = os.getpid()
            pid = os.fork()
            if pid == 0:
                _be_rank(function, rank, world_size, folder, timeout_s, parent)
            pids[pid] = rank
        deadline = time.monotonic() + timeout_s
        while len(statuses) < world_size and all(status == _OK for status in statuses.values()):
            timed_out = time.monotonic() > deadline
            if timed_out:
                break
            _reap(pids, statuses)
            time.sleep(0.002)
        # Wait briefly, so that all ranks that fail for the same reason can report it.
        end_of_grace = time.monotonic() + 0.5
        while len(statuses) < world_size and time.monotonic() < end_of_grace and not timed_out:
            _reap(pids, statuses)
            time.sleep(0.002)
    finally:
        stopped = [rank for rank in range(world_size) if rank not in statuses]
        _kill(pids, statuses)
        report = _report(folder, statuses, stopped=stopped, timed_out=timed_out, timeout_s=timeout_s)
        skips = [(folder / f"skip_{rank}").read_text() for rank, status in statuses.items() if status == _SKIPPED]
        shutil.rmtree(folder, ignore_errors=True)
    if timed_out or any(status not in (_OK, _SKIPPED) for status in statuses.values()):
        pytest.fail(report, pytrace=False)
    if skips:
        pytest.skip(skips[0])


def _import_what_ranks_need() -> None:
    import torch

    from mmscale.runtime import groups  # noqa: F401  imports megatron-core, adapted to this machine

    assert os.environ.get("OMP_NUM_THREADS") == "1", "forked ranks hang with OpenMP threads: see tests/conftest.py"
    torch.set_num_threads(1)


def _be_rank(
    function: Callable[..., None], rank: int, world_size: int, folder: Path, timeout_s: float, parent: int
) -> None:
    """The complete run of a rank; it never returns into pytest, which is in this process too."""
    status = _FAILED
    try:
        os.setpgid(0, 0)  # so that processes started by the rank are ended together with it
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no orphans if pytest is killed
        if os.getppid() != parent:
            os._exit(_FAILED)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        output = os.open(folder / f"output_{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        faulthandler.enable(file=sys.stderr)  # pytest's writes to the parent's stderr
        faulthandler.dump_traceback_later(max(timeout_s - 1.0, timeout_s / 2), file=sys.stderr)
        if Path("/sys/class/net/lo").exists():
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # host names cannot be resolved everywhere
        ranks = Ranks(
            rank=rank,
            world_size=world_size,
            local_rank=rank,
            local_world_size=world_size,
            source="local",
            rendezvous=str(folder / "rendezvous"),
        )
        try:
            function(ranks=ranks)
            status = _OK
        except pytest.skip.Exception as skip:
            (folder / f"skip_{rank}").write_text(str(skip))
            status = _SKIPPED
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            lines = traceback.format_list(frames[1:]) + traceback.format_exception_only(error)
            (folder / f"error_{rank}").write_text("".join(lines))
            (folder / f"when_{rank}").write_text(str(time.monotonic()))
        if status == _OK:
            from mmscale.runtime import groups

            groups.finalize()  # does nothing if the test has called it
    except BaseException:
        status = _FAILED
        with contextlib.suppress(BaseException):
            traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _reap(pids: dict[int, int], statuses: dict[int, int]) -> None:
    for pid, rank in pids.items():
        if rank in statuses:
            continue
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            continue
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # before reaping, while the id of the group cannot be reused
        statuses[rank] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _kill(pids: dict[int, int], statuses: dict[int, int]) -> None:
    for pid, rank in pids.items():
        if rank not in statuses:
            for end in (os.killpg, os.kill):  # the group may not exist yet
                with contextlib.suppress(ProcessLookupError):
                    end(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _report(folder: Path, statuses: dict[int, int], *, stopped: list[int], timed_out: bool, timeout_s: float) -> str:
    """The failures in the order in which they happened: the first one is the cause, lost connections are the effect."""

    def when(rank: int) -> float:
        path = folder / f"when_{rank}"
        return float(path.read_text()) if path.exists() else 0.0

    parts = [f"ranks {stopped} did not end within {timeout_s:g} s"] if timed_out else []
    bad = [rank for rank, status in statuses.items() if status not in (_OK, _SKIPPED)]
    for rank in sorted(bad, key=when):
        status = statuses[rank]
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else "failed"
        error = folder / f"error_{rank}"
        text = error.read_text() if error.exists() else ""
        parts.append(f"rank {rank} of {len(statuses) + len(stopped)} {how}\n{text}")
    for path in sorted(folder.glob("output_*")):
        # The stack of a rank that timed out continues into pytest. Omit the part below the test function, and
        # faulthandler's list of all loaded modules, because the output is limited.
        lines = [line for line in path.read_text(errors="replace").splitlines() if not _NOISE.search(line)]
        text = "\n".join(lines)[-4000:].strip()
        if text:
            parts.append(f"--- output of rank {path.name.removeprefix('output_')}\n{text}")
    if stopped and not timed_out:
        parts.append(f"(ranks {stopped} were still running and were stopped)")
    return "\n".join(parts)


def spoken(err: str) -> str:
    """The stderr of a command without lines about waiting, which depend on the machine's load."""
    return re.sub(r"^.* \.\.\.( \d+ s)?\n", "", err, flags=re.MULTILINE)
