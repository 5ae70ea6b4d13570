# layers.jsonl for heat maps: as many records, evenly spread over the run, as a page can carry.
# Of a long file only those are read that are shown.
"""Figures of every layer over time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from mmscale.train.metrics import LAYERS

RECORDS = 60
BYTES = 900_000  # of JSON, of one run


def layers_of(run: Path, *, records: int = RECORDS, limit: int = BYTES) -> list[dict[str, Any]]:
    """Records `{"step", "attempt", "layers"}` in the order of steps; empty where the run wrote none.

    Args:
        run: its folder.
        records: at most as many, the first and the last among them.
        limit: bytes of JSON of all of them together, about.
    """
    file = run / LAYERS
    if not file.is_file():
        return []
    kept: list[dict[str, Any]] = []
    with file.open("rb") as lines:
        for record in _spread(lines, file.stat().st_size, records=records, limit=limit):
            # What comes later in the file is done again from there on.
            while kept and kept[-1]["step"] >= record["step"]:
                kept.pop()
            kept.append(record)
    return kept


def _spread(lines: BinaryIO, size: int, *, records: int, limit: int) -> Iterator[dict[str, Any]]:
    """Whole records at evenly spread places of a file."""
    length = max(1, len(lines.readline()))
    number = max(2, min(records, limit // length))
    if size <= number * length:
        lines.seek(0)
        yield from filter(None, map(_record, lines))
        return
    places = [round(i * (size - length) / (number - 1)) for i in range(number)]
    last = -1
    for place in places:
        lines.seek(max(0, place - 1))
        if place > 0:
            lines.readline()  # to the next beginning; the byte before it tells whether this is one
        begin = lines.tell()
        line = lines.readline()
        if not line and place == places[-1]:  # the last line is longer than the first
            line, begin = _last_line(lines, size, length)
        record = _record(line)
        if record is not None and begin > last:
            last = begin
            yield record


def _last_line(lines: BinaryIO, size: int, length: int) -> tuple[bytes, int]:
    reach = length
    while True:
        reach = min(size, 2 * reach)
        lines.seek(size - reach)
        tail = lines.read(reach).rstrip(b"\n")
        cut = tail.rfind(b"\n")
        if cut >= 0 or reach == size:
            return tail[cut + 1 :], size - reach + cut + 1


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    if isinstance(record, dict) and isinstance(record.get("step"), int) and isinstance(record.get("layers"), dict):
        return record
    return None
