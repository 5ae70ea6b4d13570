# A thread in every rank that notices when no step ends any more, writes down where its rank stands, ends the attempt.
# It restarts nothing (the launcher does) and runs no collective: those are what may hang.
"""Hang watch.

A rank that waits for ever in a collective says nothing by itself, and neither does the one it waits for. Each rank
therefore notes every border between two steps; when none came for too long, its thread writes the stacks of all threads
and whether the main one stands in a collective into RUN/logs/attempt_N/hang/rank_R.json, and ends the process with
`HUNG`. `culprits` reads all of these files: those who did not enter the collective that the others wait in. A border
that comes just then takes the file away again, and the watch goes on.

Where torch's flight recorder is on (TORCH_FR_BUFFER_SIZE, which `launch` sets for its ranks; for NCCL and gloo alike)
the last collectives of each process group are in flight_R.json beside it, and how many a rank has entered tells who
is behind.
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

HUNG = 76  # exit status: a crash, for the launcher
FOLDER = "hang"
_FLOOR_S, _FACTOR = 300.0, 10.0
_DISK_S = 10.0  # a report that is not written by then tells of a disk that does not answer
_GRACE_S = 3.0  # between a rank's report and its end: the launcher ends all ranks with the first, and all should report
_LATE_S = 2.0  # a rank that runs looks once a second; one that reports after others' grace is 3 s late
# Files of torch in which a rank waits for others; a backward pass waits in C++, called from the last one.
_WAITS_IN = ("torch/distributed/distributed_c10d.py", "torch/distributed/c10d_logger.py")
T = TypeVar("T")


@dataclass(frozen=True)
class Report:
    """Where a rank stood.

    Attributes:
        rank, host: which one.
        step: the last one whose border it reached.
        borders: how many it reached in this attempt.
        waited_s: since the last one [seconds].
        in_collective: whether its main thread waited for other ranks.
        stack: of its main thread, innermost last: "file:line function".
        collectives: how many it has entered, by number of the process group; empty without a flight recorder.
        late_s: how much longer it waited than it should have before it reported [seconds].
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
    """Watches one rank while it is entered. Begins with the first `beat`: starting up takes as long as it takes.

    Args:
        rank: of this process.
        folder: RUN/logs/attempt_N.
        timeout_s: None: ten times the longest time between two borders so far, but five minutes at least.
        recorded: gives the flight recorder's JSON, None where there is none.
        end: ends the process; tests give another one.
    """

    def __init__(
        self,
        *,
        rank: int,
        folder: Path,
        timeout_s: float | None,
        recorded: Callable[[], str | None] = lambda: None,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self.rank = rank
        self.folder = folder / FOLDER
        self._timeout_s = timeout_s
        self._recorded = recorded
        self._end = end
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
        # A peer that ends itself first breaks the collective that others wait in: what they have reported stays true.
        self._failed = kind is not None
        self._over.set()
        self._thread.join(_GRACE_S + 2.0)

    @property
    def timeout_s(self) -> float:
        """How long a step may take now [seconds]."""
        learned = max(_FLOOR_S, _FACTOR * self._longest)
        return (learned if self._timeout_s is None else self._timeout_s) + self._allowed_s

    def beat(self, step: int, *, allowed_s: float = 0.0) -> None:
        """A border is reached, before ranks agree on anything there; also between two batches of an evaluation.

        Args:
            step: the last one that was done.
            allowed_s: what follows may take this much longer than a step, and teaches nothing: a save that is waited
                for, or a roll-back.
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
                self._end(HUNG)
                return
            if not self._failed:  # a near miss
                _in_thread(functools.partial(self._file.unlink, missing_ok=True)).wait(_DISK_S)

    @property
    def _file(self) -> Path:
        return self.folder / f"rank_{self.rank}.json"

    def _report(self, waited_s: float) -> bool:
        """Write down where this rank stands; whether the disk did not answer, and does now or the loop is over."""

        def work() -> None:
            # The disk comes last: it may be full, read-only, or what hangs.
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
        report = Report(
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
        temporary = self.folder / f".rank_{self.rank}"
        temporary.write_text(json.dumps(asdict(report), indent=1))
        temporary.replace(self._file)

    def _flight(self) -> dict[str, int]:
        """Write down what the flight recorder has; collectives that this rank has entered, by group."""
        text = self._recorded()
        if text is None:
            return {}
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"flight_{self.rank}.json").write_text(text)
        return entered(json.loads(text))


def _in_thread(action: Callable[[], object]) -> threading.Event:
    """Do something that a frozen disk may never end; the event is set when it has ended."""
    ended = threading.Event()

    def work() -> None:
        try:
            _tried(action)
        finally:
            ended.set()

    threading.Thread(target=work, name="hang-report", daemon=True).start()
    return ended


def _tried(action: Callable[[], T]) -> T | None:
    """What the action gives, or None: what cannot be said or written down must not keep a hung process alive."""
    try:
        return action()
    except Exception:
        with contextlib.suppress(Exception):  # a log on the same full disk
            traceback.print_exc()
        return None


def entered(recorded: Mapping[str, Any]) -> dict[str, int]:
    """How many collectives a process has entered, by the number of the group, from its flight recorder's JSON."""
    last: dict[str, int] = {}
    for entry in recorded.get("entries", []):
        if not entry.get("is_p2p"):
            number = str(entry["process_group"][0])  # the same on all ranks, whether they are in the group or not
            last[number] = max(last.get(number, 0), int(entry["collective_seq_id"]))
    return last


def reports(folder: Path) -> list[Report]:
    """Reports of an attempt that hung, by rank; empty if it did not."""
    found = []
    for file in (folder / FOLDER).glob("rank_*.json"):
        try:
            found.append(bounded.read_record(Report, file))
        except (OSError, ValueError):
            continue
    return sorted(found, key=lambda report: report.rank)


def culprits(found: Sequence[Report], *, world_size: int) -> list[int]:
    """Ranks that the others waited for.

    Those who could not even report (stopped, dead), or only after the others had ended (SLURM wakes a stopped process
    before it ends it); else those who stand outside of a collective while others wait in
    one; else those who have entered fewer collectives of a group than others of it; else those who reached the fewest
    borders. All of them if nothing tells them apart.
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
