# `make test` and `make test-long` call this. Which tests are `long` is marked at the tests; how long they take is
# measured by tests/durations.py.
"""Runs a tier of the tests as several processes of pytest at once, called streams.

    python -m tests.streams test [arguments of pytest]
    python -m tests.streams long [arguments of pytest]

The first stream prints at once, the others into `.pytest_cache/TIER-NAME.log`; these files are printed at the end,
followed by the wall and CPU time of each stream. A stream for which no test is chosen (status 5) is no failure unless
that is so for all of them. SIGINT and SIGTERM are passed on to every stream. Each stream has a cache of its own, for
instance for `--last-failed`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOGS = ROOT / ".pytest_cache"
NO_TESTS = 5


@dataclass(frozen=True)
class Stream:
    """One process of pytest.

    Attributes:
        name: of its cache and log.
        paths: folders and files below `tests`; empty for everything that no other stream of the tier runs.
        without: what it leaves out of these.
    """

    name: str
    paths: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


# The expressions and `exhaustive` divide all tests; tests/unit/test_streams.py compares.
SELECTED = {"test": "not long and not exhaustive", "long": "long and not exhaustive"}

# These take as long as the other files of tests/slurm. Bridges of networks are counted on the whole machine, so the
# files that make them are in one stream.
_SLURM_TOO = tuple(
    f"slurm/test_{name}.py" for name in ("interruptions", "local_cluster", "slow_faults", "soak", "successors")
)
# Ranks are forks of the process that collected the tests, and a fork costs the more, the more modules that process has
# imported. These folders import nothing of transformers, pandas or matplotlib.
_RANKS = ("distributed", *(f"unit/{name}" for name in ("checkpoint", "model", "resilience", "runtime", "train")))
# Balanced by CPU time, as docs/results/durations.md has it, and one more than two cores compute at once, because tests
# wait for disks and processes. tests/slurm waits for SLURM more than it computes.
STREAMS: dict[str, tuple[Stream, ...]] = {
    "test": (
        Stream("end-to-end"),
        Stream("ranks", _RANKS),
        Stream("unit", ("unit",), without=_RANKS[1:]),
        Stream("slurm", ("slurm",)),
    ),
    "long": (
        Stream("end-to-end"),
        Stream("distributed", ("distributed", "unit")),
        Stream("slurm", ("slurm",), without=_SLURM_TOO),
        Stream("slurm-too", _SLURM_TOO),
    ),
}


def arguments(stream: Stream, tier: str) -> list[str]:
    """Arguments of pytest that select a stream's tests.

    Args:
        stream: one of `STREAMS[tier]`.
        tier: a key of `STREAMS`.
    """
    without = stream.without
    if not stream.paths:
        without = (*without, *(path for other in STREAMS[tier] for path in other.paths))
    paths = [f"tests/{path}" for path in stream.paths or ("",)]
    return [*(path.rstrip("/") for path in paths), *(f"--ignore=tests/{path}" for path in without)]


def run(tier: str, options: Sequence[str], *, python: str = sys.executable, logs: Path = LOGS) -> int:
    """Run a tier; returns the exit status.

    Args:
        tier: a key of `STREAMS`.
        options: further arguments of pytest.
        python: the interpreter of the streams.
        logs: folder of the streams' output.
    """
    first, *others = STREAMS[tier]
    logs.mkdir(exist_ok=True)
    files = {other.name: logs / f"{tier}-{other.name}.log" for other in others}
    print(f"output of {', '.join(files)}: at the end, and in {logs}/{tier}-*.log", flush=True)
    processes: dict[int, tuple[Stream, subprocess.Popen[bytes]]] = {}

    def pass_on(number: int, _: object) -> None:
        for pid in list(processes):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    began = time.monotonic()
    try:
        for stream in (first, *others):
            process = _start(stream, tier, options, python=python, log=files.get(stream.name))
            processes[process.pid] = (stream, process)
        statuses, times = _wait(processes, began)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for name, file in files.items():
        print(f"--- {name}\n{file.read_text(errors='replace')}")
    print("\n".join(times), flush=True)
    failed = [status for status in statuses if status not in (0, NO_TESTS)]
    if failed:
        return failed[0] if failed[0] > 0 else 128 - failed[0]
    return min(statuses)


def _start(
    stream: Stream, tier: str, options: Sequence[str], *, python: str, log: Path | None
) -> subprocess.Popen[bytes]:
    """Start a stream; `log`: None for this process's output."""
    command = [python, "-m", "pytest", "-m", SELECTED[tier], *options]
    command += ["-o", f"cache_dir=.pytest_cache/{tier}-{stream.name}", *arguments(stream, tier)]
    # Ranks compute on the CPU, even on a machine with GPUs.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    with contextlib.ExitStack() as opened:
        out = None if log is None else opened.enter_context(log.open("wb"))
        # In a group of its own, so that Ctrl-C reaches it once, through this process.
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, process_group=0
        )


def _wait(processes: dict[int, tuple[Stream, subprocess.Popen[bytes]]], began: float) -> tuple[list[int], list[str]]:
    """Wait for all of them, and take those that have ended out of `processes`.

    Returns:
        Exit statuses, and a line about each stream: wall time since `began`, and the CPU time of its processes that
        somebody has waited for.
    """
    statuses, lines = [], []
    while processes:
        pid, status, used = os.wait4(-1, 0)
        if pid not in processes:
            continue
        stream, process = processes.pop(pid)
        process.returncode = os.waitstatus_to_exitcode(status)
        statuses.append(process.returncode)
        wall, cpu = time.monotonic() - began, used.ru_utime + used.ru_stime
        lines.append(f"{stream.name:<12} {wall:6.0f} s  {cpu:6.0f} s of CPU  exit status {process.returncode}")
    return statuses, lines


if __name__ == "__main__":
    if sys.argv[1:2] not in [[tier] for tier in STREAMS]:
        sys.exit(f"error: name a tier: {' or '.join(STREAMS)}")
    sys.exit(run(sys.argv[1], sys.argv[2:]))
