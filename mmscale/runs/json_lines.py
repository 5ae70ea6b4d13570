"""One line of a run's append-only files: metrics.jsonl, layers.jsonl, events.jsonl.

Each line is one JSON object, written by one system call, so a killed run leaves at most one torn line, at the end.
JSON has no NaN: a value that is not finite is written as the string "nan", "inf" or "-inf" and read back as a float.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmscale import bounded

LARGEST = 1 << 53  # largest count or time that a float represents exactly

_log = logging.getLogger(__name__)
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def line_of(record: Mapping[str, Any]) -> bytes:
    """A record as a line of the file."""
    return (json.dumps(record, allow_nan=False, default=str) + "\n").encode()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file in order. A torn line is skipped; a missing file has none."""
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
    """A line of the logs, without common fields that should be numbers and are not.

    Returns:
        None if the line is not a JSON object, or has no number of the attempt that wrote it.
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
    """Whether a value is a non-negative integer."""
    return type(value) is int and 0 <= value <= LARGEST


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= LARGEST  # NaN is not


_COUNTED: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("step", "rollback"), is_count),
    **dict.fromkeys(("time", "since", "step_time_s", "save_stall_s", "eval_s"), _is_time),
    **dict.fromkeys(("event", "launch", "why", "cause"), lambda value: isinstance(value, str)),
}


def as_json(value: Any) -> Any:
    """A value in a form that JSON supports."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def from_json(value: Any) -> Any:
    """The inverse of `as_json`."""
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value
