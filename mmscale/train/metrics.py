# What a run writes down about itself: metrics.jsonl, layers.jsonl and events.jsonl; and how these are read back.
# It measures nothing (throughput.py does), decides nothing, and needs no torch to be read.
"""The run directory's append-only logs.

Each line is one JSON object, written by one system call, so a killed run leaves at most one torn line, at the end. A
disk that refuses or hangs ends nothing: runtime/disk_writer.py keeps the lines until it takes them.
JSON knows no NaN: a value that is not finite is written as the string "nan", "inf" or "-inf", and `read_metrics` gives
it back as a float. A step that is done again after a resume appears again, with a higher "attempt"; one that is done
again after a roll-back within an attempt, with a higher "rollback" (left out while it is 0).
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

from mmscale import bounded
from mmscale.runtime.disk_writer import Appended, DiskWriter
from mmscale.train.backends import Backends
from mmscale.train.held_out import EVAL
from mmscale.train.throughput import Throughput

__all__ = [
    "CUT_SHORT",
    "EVAL",
    "EVENTS",
    "LAYERS",
    "METRICS",
    "EventLog",
    "MetricsLog",
    "Throughput",
    "evaluation_cut_short",
    "next_attempt",
    "read_events",
    "read_metrics",
]

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
LAYERS = "layers.jsonl"
CUT_SHORT = "evaluation_cut_short"  # an event, with the step

LARGEST = 1 << 53  # of a count or a time: what a float has exactly

_log = logging.getLogger(__name__)
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricsLog:
    """metrics.jsonl and layers.jsonl, and whatever else takes figures. Rank 0 holds one; other ranks hold none.

    Args:
        run_dir: The run's folder; made if it is missing.
        attempt: Number of this attempt, from `next_attempt`.
        backends: TensorBoard and others that get the figures too.
        may_write: Called before every line; raises if this process must not write any more.
        writer: Does the writing, and is closed by its owner; default: one of its own.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        attempt: int,
        backends: Backends | None = None,
        may_write: Callable[[], None] | None = None,
        writer: DiskWriter | None = None,
    ) -> None:
        self.attempt = attempt
        self.rollback = 0
        self._owned = writer is None
        self._writer = writer or DiskWriter(str(run_dir))
        self._lines = Appended(run_dir / METRICS, self._writer, may_write=may_write)
        self._layers = Appended(run_dir / LAYERS, self._writer, may_write=may_write)
        self._lines.touch()
        self._backends = backends or Backends({})

    def attach(self, backends: Backends) -> None:
        """Hand the figures of coming steps to these back ends too, and close them in the end."""
        self._backends = backends

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Append the values of one step. A value that is None was not measured and is left out.

        Held-out values may come in a line of their own with the same step: `read_metrics` puts them together.
        """
        numbers = {key: _number(value) for key, value in values.items() if value is not None}
        self._lines.append(_line(self._place(step) | {key: _as_json(value) for key, value in numbers.items()}))
        shown = {key: value for key, value in numbers.items() if key != "time"}  # back ends have clocks of their own
        self._backends.write(step, shown, attempt=self.attempt)

    def write_layers(self, step: int, layers: Mapping[str, Any]) -> None:
        """Append the figures of every layer to layers.jsonl; read back by `report.layers.layers_of`."""
        self._layers.append(_line(self._place(step) | {"layers": dict(layers)}))

    def rolled_back(self, number: int) -> None:
        """Steps come again from here on.

        Args:
            number: of the roll-back, counted over the whole run.
        """
        self.rollback = number
        self._backends.rolled_back()

    def close(self) -> None:
        """Write what is left."""
        if self._owned:
            self._writer.close()
        self._backends.close()

    def _place(self, step: int) -> dict[str, Any]:
        place = {"step": step, "attempt": self.attempt}
        return place | {"rollback": self.rollback} if self.rollback else place


class EventLog:
    """events.jsonl: start, resume, save_begin, save_committed, fault, rollback, skip, stop, finish.

    Args:
        run_dir: The run's folder; made if it is missing.
        attempt: Number of this attempt, from `next_attempt`.
        may_write: Called before every line; raises if this process must not write any more.
        writer: Does the writing, and is closed by its owner; default: one of its own, whose outages are events here.
    """

    def __init__(
        self,
        run_dir: Path,
        attempt: int,
        *,
        may_write: Callable[[], None] | None = None,
        writer: DiskWriter | None = None,
    ) -> None:
        self.attempt = attempt
        self.writer = writer or DiskWriter(str(run_dir), on_change=self.add)
        self._owned = writer is None
        self._lines = Appended(run_dir / EVENTS, self.writer, may_write=may_write)
        self._lines.touch()

    def add(self, event: str, **fields: Any) -> None:
        """Append one event with the time [seconds since 1970] and whatever belongs to it."""
        plain = {key: _as_json(value) for key, value in fields.items()}
        self._lines.append(_line({"time": round(time.time(), 3), "attempt": self.attempt, "event": event, **plain}))

    def close(self) -> None:
        """Write what is left."""
        if self._owned:
            self.writer.close()


def next_attempt(run_dir: Path) -> int:
    """Number of the attempt that starts now: 1, or one above what events.jsonl and config.N.yaml know of."""
    known = [event["attempt"] for event in read_events(run_dir) if isinstance(event.get("attempt"), int)]
    names = [re.fullmatch(r"config\.(\d+)\.yaml", file.name) for file in run_dir.glob("config.*.yaml")]
    known += [int(name[1]) for name in names if name]
    return max(known, default=0) + 1


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """One record per step, in the order of steps. Of a step that was done again the last time counts.

    A line with nothing but held-out values (`eval/...`) is added to its step instead of replacing it.
    """
    steps: dict[int, dict[str, Any]] = {}
    for line in _read_lines(run_dir / METRICS):
        step = line.get("step")
        if not isinstance(step, int):
            continue
        record = {key: _from_json(value) for key, value in line.items()}
        known = steps.get(step)
        if known is None:
            steps[step] = record
            continue
        newer, older = _time(record), _time(known)
        if newer > older and not _held_out_only(record):
            steps[step] = record
        elif newer >= older:  # a line of an older attempt here comes from a process that should have been gone
            known.update(record)
    return [steps[number] for number in sorted(steps)]


def evaluation_cut_short(run_dir: Path, step: int) -> bool:
    """Whether a request to stop cut the evaluation after a step short, and it was not made since."""
    if not any(event["event"] == CUT_SHORT and event.get("step") == step for event in read_events(run_dir)):
        return False
    return not any(line.get("step") == step and _held_out_only(line) for line in _read_lines(run_dir / METRICS))


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """All events in the order they were written."""
    return [event for event in _read_lines(run_dir / EVENTS) if "event" in event and "time" in event]


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, allow_nan=False, default=str) + "\n").encode()


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(bounded.lines(file), start=1):
            record = parse_line(line)
            if record is not None:
                yield record
            elif line.strip():
                _log.info("%s:%d is torn and left out", path, number)


def parse_line(line: bytes) -> dict[str, Any] | None:
    """A line of the logs, without the fields that every reader counts with where they are no numbers.

    Returns:
        None where the line is no JSON object, or does not say which attempt wrote it.
    """
    try:
        record = bounded.parse_json(line.decode("utf-8", "replace"))
    except ValueError:
        return None
    if not isinstance(record, dict) or not is_count(record.get("attempt", 0)):
        return None
    wrong = [name for name, fits in _COUNTED.items() if name in record and not fits(record[name])]
    for name in wrong:
        del record[name]
    return record


def is_count(value: Any) -> bool:
    """Whether a value is a whole number that counts something."""
    return type(value) is int and 0 <= value <= LARGEST


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= LARGEST  # NaN is not


_COUNTED: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("step", "rollback"), is_count),
    **dict.fromkeys(("time", "since", "step_time_s", "save_stall_s", "eval_s"), _is_time),
    **dict.fromkeys(("event", "launch", "why", "cause"), lambda value: isinstance(value, str)),
}


def _time(record: Mapping[str, Any]) -> tuple[int, int]:
    """Which time it is that a step is done."""
    return record.get("attempt", 0), record.get("rollback", 0)


def _held_out_only(record: Mapping[str, Any]) -> bool:
    return all(key.startswith(EVAL) for key in record if key not in ("step", "attempt", "rollback"))


def _number(value: Any) -> int | float:
    return int(value) if isinstance(value, Integral) else float(value)


def _as_json(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _from_json(value: Any) -> Any:
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value
