"""Hang detection.

A thread in every rank that notices when no step ends any more, reports where its rank waits, and ends the attempt. The
launcher restarts ranks. The thread runs no collective, because collectives are what may hang.

A rank that waits for ever in a collective prints nothing, and neither does the rank that it waits for. So each rank
records every step boundary. If there was none for too long, its thread writes the stacks of all threads, and whether
the main thread waits in a collective, into RUN/logs/attempt_N/hang/rank_R.json, and ends the process with `HUNG`.
`culprits` reads all of these files and finds the ranks that did not enter the collective that the others wait in. If a
step boundary is reached just then, the file is removed and the watch continues.

If torch's flight recorder is active (TORCH_FR_BUFFER_SIZE, which `launch` sets for its ranks; for NCCL and gloo) the
last collectives of each process group are written to flight_R.json, and the number of entered collectives shows which
rank is behind.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from mmscale import bounded
from mmscale.runtime.atomic_files import write_atomic

HUNG = 76  # exit status; the launcher treats it as a crash
FOLDER = "hang"
_FLOOR_S, _FACTOR = 300.0, 10.0
_DISK_S = 10.0  # if the report is not written by then, the disk hangs
_GRACE_S = 3.0  # between a rank's report and its end: the launcher ends all ranks with the first, and all should report
_LATE_S = 2.0  # a running rank checks once a second; one that reports after others' grace period is 3 s late
# Files of torch in which a rank waits for others; a backward pass waits in C++, called from the last one.
_WAITS_IN = ("torch/distributed/distributed_c10d.py", "torch/distributed/c10d_logger.py")
T = TypeVar("T")
_exit = os._exit


@dataclass(frozen=True)
class HangReport:
    """The state of a hanging rank.

    Attributes:
        rank, host: of the report.
        step: the last step whose boundary it reached.
        borders: number of boundaries that it reached in this attempt.
        waited_s: time since the last one [seconds].
        in_collective: whether its main thread waited for other ranks.
        stack: of its main thread, innermost last: "file:line function".
        collectives: number of entered collectives, by number of the process group; empty without a flight recorder.
        late_s: delay of the report beyond the timeout [seconds].
    """

    rank: int
    host: str
    step: int
    borders: int
    waited_s: float
    in_collective: bool
    stack: list[str]
    collectives: dict[str, int] = field(default_factory=dict)
    late_s: float = 0.0


class Watchdog:
    """Watches one rank while it is entered. It starts with the first `beat`, because start-up has no time limit.

    Args:
        rank: of this process.
        folder: RUN/logs/attempt_N.
        timeout_s: None: ten times the longest time between two boundaries so far, at least five minutes.
        recorded: returns the flight recorder's JSON, or None.
    """

    def __init__(
        self,
        *,
        rank: int,
        folder: Path,
        timeout_s: float | None,
        recorded: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.rank = rank
        self.folder = folder / FOLDER
        self._timeout_s = timeout_s
        self._recorded = recorded
        self._main = threading.get_ident()
        self._last: float | None = None
        self._longest = 0.0
        self._allowed_s = 0.0
        self._step = 0
        self._borders = 0
        self._failed = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang-watch", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A peer that ends first breaks the collective that others wait in; their reports stay valid.
        self._failed = kind is not None
        self._over.set()
        self._thread.join(_GRACE_S + 2.0)

    @property
    def timeout_s(self) -> float:
        """How long a step may take now [seconds]."""
        learned = max(_FLOOR_S, _FACTOR * self._longest)
        return (learned if self._timeout_s is None else self._timeout_s) + self._allowed_s

    def beat(self, step: int, *, allowed_s: float = 0.0) -> None:
        """A step boundary is reached, before any collective there; also called between two batches of an evaluation.

        Args:
            step: the last completed step.
            allowed_s: additional time for what follows, which is not used to estimate the timeout: waiting for a save,
                or a roll-back.
        """
        now = time.monotonic()
        if self._last is not None and not self._allowed_s:
            self._longest = max(self._longest, now - self._last)
        self._last, self._step, self._borders, self._allowed_s = now, step, self._borders + 1, allowed_s

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self.timeout_s / 10)):
            last = self._last
            if last is None or time.monotonic() - last < self.timeout_s:
                continue
            frozen = self._report(time.monotonic() - last)
            if frozen and self._last == last:
                self._last = time.monotonic()
            elif not self._over.wait(_GRACE_S) and self._last == last:
                _exit(HUNG)
                return
            if not self._failed:  # it was only slow
                _in_thread(functools.partial(self._file.unlink, missing_ok=True)).wait(_DISK_S)

    @property
    def _file(self) -> Path:
        return self.folder / f"rank_{self.rank}.json"

    def _report(self, waited_s: float) -> bool:
        """Write the report of this rank. Returns whether the disk hung and then recovered, or the loop has ended."""

        def work() -> None:
            # The disk comes last: it may be full, read-only, or the cause of the hang.
            _tried(lambda: self._say(waited_s))
            collectives = _tried(self._flight)
            _tried(lambda: self._write(waited_s, collectives or {}))

        written = _in_thread(work)
        if written.wait(_DISK_S):
            return False
        while not written.wait(1.0) and not self._over.is_set():
            pass
        return True

    def _say(self, waited_s: float) -> None:
        sys.stderr.write(
            f"no step has ended for {waited_s:.0f} s after step {self._step}; stacks of rank {self.rank}:\n"
        )
        sys.stderr.flush()
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)

    def _write(self, waited_s: float, collectives: dict[str, int]) -> None:
        frame = sys._current_frames().get(self._main)
        frames = traceback.extract_stack(frame) if frame is not None else []
        waits = any(entry.filename.endswith(_WAITS_IN) for entry in frames)
        stack = [f"{entry.filename}:{entry.lineno} {entry.name}" for entry in frames]
        report = HangReport(
            rank=self.rank,
            host=socket.gethostname(),
            step=self._step,
            borders=self._borders,
            waited_s=round(waited_s, 1),
            in_collective=waits,
            stack=stack,
            collectives=collectives,
            late_s=round(waited_s - self.timeout_s, 1),
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._file, json.dumps(asdict(report), indent=1), durable=False)  # the disk may be what hangs

    def _flight(self) -> dict[str, int]:
        """Write the flight recorder's record; returns the number of entered collectives by group."""
        text = self._recorded()
        if text is None:
            return {}
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"flight_{self.rank}.json").write_text(text)
        return entered(bounded.parse_json(text))


def _in_thread(action: Callable[[], object]) -> threading.Event:
    """Run an action that may never return on a frozen disk; the event is set when it has returned."""
    ended = threading.Event()

    def work() -> None:
        try:
            _tried(action)
        finally:
            ended.set()

    threading.Thread(target=work, name="hang-report", daemon=True).start()
    return ended


def _tried(action: Callable[[], T]) -> T | None:
    """The result of the action, or None on an error: a failing report must not keep a hung process alive."""
    try:
        return action()
    except Exception:
        with contextlib.suppress(Exception):  # a log on the same full disk
            traceback.print_exc()
        return None


def entered(recorded: Mapping[str, Any]) -> dict[str, int]:
    """Number of collectives that a process has entered, by the number of the group, from its flight recorder's JSON."""
    last: dict[str, int] = {}
    for entry in recorded.get("entries", []):
        if not entry.get("is_p2p"):
            number = str(entry["process_group"][0])  # the same number on all ranks, members of the group or not
            last[number] = max(last.get(number, 0), int(entry["collective_seq_id"]))
    return last


def reports(folder: Path) -> list[HangReport]:
    """Reports of an attempt that hung, by rank; empty if it did not."""
    found = []
    for file in (folder / FOLDER).glob("rank_*.json"):
        try:
            found.append(bounded.read_record(HangReport, file))
        except (OSError, ValueError):
            continue
    return sorted(found, key=lambda report: report.rank)


def culprits(found: Sequence[HangReport], *, world_size: int) -> list[int]:
    """Ranks that the others waited for.

    In order: ranks that could not report (stopped, dead), or only after the others had ended (SLURM wakes a stopped
    process before it ends it); ranks outside a collective while others wait in one; ranks that have entered fewer
    collectives of a group than its other members; ranks with the fewest boundaries. All ranks if nothing distinguishes
    them.
    """
    timely = {report.rank for report in found if report.late_s < _LATE_S}
    silent = sorted(set(range(world_size)) - timely)
    if timely and silent:
        return silent
    outside = [report.rank for report in found if not report.in_collective]
    if outside and len(outside) < len(found):
        return outside
    most: dict[str, int] = {}
    for report in found:
        for group, count in report.collectives.items():
            most[group] = max(most.get(group, 0), count)
    behind = [one.rank for one in found if any(count < most[group] for group, count in one.collectives.items())]
    if behind and len(behind) < len(found):
        return behind
    fewest = min(report.borders for report in found)
    return [report.rank for report in found if report.borders == fewest]
