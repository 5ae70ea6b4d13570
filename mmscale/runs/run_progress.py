"""A run's progress in a few hundred numbers.

The data that `mmscale status` needs from metrics.jsonl, so that it need not read all of it each time: the last logged
step, and groups of steps for computing goodput. The job stores it in the run folder; readers continue from there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmscale import bounded
from mmscale.runs.json_lines import parse_line
from mmscale.runs.metrics import METRICS

PROGRESS = "progress.json"
_GROUPS = 256  # groups per attempt; when there are twice as many, they are halved
_CHUNK = 1 << 20  # bytes


@dataclass
class StepGroup:
    """Consecutive lines of an attempt.

    Attributes:
        step: of the last line.
        seconds: in steps, without pauses. The first line of an attempt is a separate group, with the seconds of one
            step, because the step at which the attempt began is in the events.
        save_stall_s: sum.
        eval_s: sum.
        timed: whether a line had a step time.
        time: of the last line [seconds since 1970]; 0: unknown (progress of older versions).
    """

    step: int
    seconds: float = 0.0
    save_stall_s: float = 0.0
    eval_s: float = 0.0
    timed: bool = False
    time: float = 0.0

    def add(self, other: StepGroup) -> None:
        """Merge the following group into this one."""
        self.step = max(self.step, other.step)
        self.seconds += other.seconds
        self.save_stall_s += other.save_stall_s
        self.eval_s += other.eval_s
        self.timed = self.timed or other.timed
        self.time = max(self.time, other.time)


@dataclass
class RunProgress:
    """The part of metrics.jsonl that was read so far.

    Attributes:
        offset: bytes of the file that were read.
        last: the last line with a loss.
        attempts: groups by attempt.
    """

    offset: int = 0
    last: dict[str, Any] = field(default_factory=dict)
    attempts: dict[int, list[StepGroup]] = field(default_factory=dict)

    @classmethod
    def load(cls, run: Path) -> RunProgress:
        """The progress that the job has stored; empty if there is no such file, or it has another version."""
        try:
            found = bounded.read_object(run / PROGRESS)
            attempts = {int(name): [StepGroup(*one) for one in groups] for name, groups in found["attempts"].items()}
            return cls(int(found["offset"]), dict(found["last"]), attempts)
        except (FileNotFoundError, *bounded.BAD_CONTENT):
            return cls()

    def file(self, run: Path) -> tuple[Path, bytes]:
        """The file for the progress, and its content. Only one process of a run writes it: its job."""
        groups = {
            number: [[one.step, one.seconds, one.save_stall_s, one.eval_s, one.timed, one.time] for one in found]
            for number, found in self.attempts.items()
        }
        return run / PROGRESS, json.dumps({"offset": self.offset, "last": self.last, "attempts": groups}).encode()

    def update(self, run: Path) -> bool:
        """Read the new lines; returns whether there were any."""
        file = run / METRICS
        try:
            size = file.stat().st_size
        except FileNotFoundError:
            return False
        if size < self.offset:  # another file
            self.offset, self.last, self.attempts = 0, {}, {}
        before = self.offset
        if size > before:
            for line in self._lines(file):
                self._add(line)
        return self.offset > before

    def groups(self) -> list[dict[str, Any]]:
        """Lines in the form that `goodput` expects, one per group: sums of pauses, and the mean time of its steps."""
        found = []
        for number, groups in self.attempts.items():
            reached = None
            for one in groups:
                steps = 1 if reached is None else one.step - reached
                line = {"step": one.step, "attempt": number, "save_stall_s": one.save_stall_s, "eval_s": one.eval_s}
                line |= {"time": one.time} if one.time else {}
                found.append(line | {"step_time_s": one.seconds / steps} if one.timed and steps > 0 else line)
                reached = max(one.step, reached or 0) if one.timed else reached
        return found

    def _lines(self, file: Path) -> Iterator[dict[str, Any]]:
        """Complete lines after the offset, which is advanced past them."""
        rest = b""
        with file.open("rb") as opened:
            opened.seek(self.offset)
            while chunk := opened.read(_CHUNK):
                *whole, rest = (rest + chunk).split(b"\n")
                for text in whole:
                    self.offset += len(text) + 1
                    line = parse_line(text)
                    if line is not None and "step" in line:
                        yield line
                if len(rest) > bounded.LONGEST_LINE:  # not a line of metrics, for instance a hole in a damaged file
                    self.offset += len(rest)
                    rest = b""

    def _add(self, line: dict[str, Any]) -> None:
        if "loss" in line:
            self.last = line
        elif line["step"] == self.last.get("step") and line.get("attempt") == self.last.get("attempt"):
            self.last |= line  # held-out figures of the same step
        groups = self.attempts.setdefault(int(line.get("attempt", 0)), [])
        reached = max((one.step for one in groups[-1:] if one.timed), default=None)
        timed = "step_time_s" in line
        steps = 0 if not timed else 1 if reached is None else max(0, line["step"] - reached)
        step = line["step"] if reached is None else max(reached, line["step"])
        one = StepGroup(
            step if timed or not groups else groups[-1].step,
            steps * float(line.get("step_time_s", 0.0)),
            float(line.get("save_stall_s", 0.0)),
            float(line.get("eval_s", 0.0)),
            timed,
            float(line.get("time", 0.0)),
        )
        if groups and not steps:  # only pauses, or steps repeated after a roll-back
            groups[-1].add(one)
            return
        groups.append(one)
        if len(groups) > 2 * _GROUPS:
            self.attempts[int(line.get("attempt", 0))] = _halved(groups)


def _halved(groups: list[StepGroup]) -> list[StepGroup]:
    """Merges neighbouring groups; the first line stays separate."""
    first, *rest = groups
    for earlier, later in zip(rest[::2], rest[1::2], strict=False):
        earlier.add(later)
    return [first, *rest[::2]]
