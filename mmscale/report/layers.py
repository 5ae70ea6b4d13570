"""Reads layers.jsonl for heat maps: a bounded number of records, evenly spread over the run.

Of a long file only the records that are shown are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from mmscale import bounded
from mmscale.runs.json_lines import is_count
from mmscale.runs.metrics import LAYERS

RECORDS = 60
BYTES = 900_000  # size limit of the JSON of one run


def layers_of(run: Path, *, limit: int = BYTES) -> list[dict[str, Any]]:
    """Records `{"step", "attempt", "layers"}` in the order of steps; empty if the run wrote none.

    Layers are counted from 0, also for runs of earlier versions, whose files count them from 1.

    Args:
        run: its folder.
        limit: approximate total size of the JSON [bytes]; if co-selection would exceed it, only some records have it.
    """
    file = run / LAYERS
    if not file.is_file():
        return []
    kept: list[dict[str, Any]] = []
    with file.open("rb") as lines:
        for record in _spread(lines, file.stat().st_size, limit=limit):
            # Later records in the file repeat steps from there on.
            while kept and kept[-1]["step"] >= record["step"]:
                kept.pop()
            kept.append(record)
    return _thinned(kept, limit=limit)


def _thinned(records: list[dict[str, Any]], *, limit: int) -> list[dict[str, Any]]:
    """The records, with co-selection only in as many as the limit allows, evenly spread and including the last."""
    sizes = [(len(orjson.dumps(record)), len(orjson.dumps(_without_pairs(record)))) for record in records]
    room, pairs = limit - sum(slim for _, slim in sizes), max((whole - slim for whole, slim in sizes), default=0)
    if pairs <= 0 or len(records) * pairs <= room:
        return records
    number = max(2, room // pairs)
    chosen = {round(i * (len(records) - 1) / (number - 1)) for i in range(number)}
    return [record if place in chosen else _without_pairs(record) for place, record in enumerate(records)]


def _without_pairs(record: dict[str, Any]) -> dict[str, Any]:
    def slim(layer: dict[str, Any]) -> dict[str, Any]:
        groups = {
            group: {
                modality: {key: value for key, value in figures.items() if key != "coselection"}
                for modality, figures in some.items()
            }
            for group, some in layer.get("experts", {}).items()
        }
        return layer | ({"experts": groups} if groups else {})

    return record | {"layers": {number: slim(layer) for number, layer in record["layers"].items()}}


def _spread(lines: BinaryIO, size: int, *, limit: int) -> Iterator[dict[str, Any]]:
    """Complete records at evenly spread places of a file."""
    first = lines.readline(bounded.LONGEST_LINE)
    length, record = max(1, len(first)), _record(first)
    slim = length if record is None else len(orjson.dumps(_without_pairs(record)))
    number = max(2, min(RECORDS, limit // (2 * slim)))
    if size <= number * length:
        lines.seek(0)
        yield from filter(None, map(_record, bounded.lines(lines)))
        return
    places = [round(i * (size - length) / (number - 1)) for i in range(number)]
    last = -1
    for place in places:
        lines.seek(max(0, place - 1))
        if place > 0:
            # To the next beginning of a line; the preceding byte shows whether this is one.
            lines.readline(bounded.LONGEST_LINE)
        begin = lines.tell()
        line = lines.readline(bounded.LONGEST_LINE)
        if not line and place == places[-1]:  # the last line is longer than the first one
            line, begin = _last_line(lines, size, length)
        record = _record(line)
        if record is not None and begin > last:
            last = begin
            yield record


def _last_line(lines: BinaryIO, size: int, length: int) -> tuple[bytes, int]:
    reach, limit = length, min(size, bounded.LONGEST_LINE)
    while True:
        reach = min(limit, 2 * reach)
        lines.seek(size - reach)
        tail = lines.read(reach).rstrip(b"\n")
        cut = tail.rfind(b"\n")
        if cut >= 0 or reach == limit:
            return tail[cut + 1 :], size - reach + cut + 1


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = orjson.loads(line)
    except ValueError:
        return None
    if not (isinstance(record, dict) and is_count(record.get("step")) and _are_layers(record.get("layers"))):
        return None
    first = record.pop("first_layer", 1)  # not written by earlier versions
    if first == 1:
        record["layers"] = {str(int(number) - 1): layer for number, layer in record["layers"].items()}
    return record


def _are_layers(layers: Any) -> bool:
    """Whether these are figures by name, of each layer by its number; experts' by group and modality."""
    return isinstance(layers, dict) and all(_is_layer(number, layer) for number, layer in layers.items())


def _is_layer(number: str, layer: Any) -> bool:
    named = number.isdecimal() and len(number) < 7
    return named and isinstance(layer, dict) and _are_dicts(layer.get("experts", {}), depth=2)


def _are_dicts(value: Any, *, depth: int) -> bool:
    if not isinstance(value, dict):
        return False
    return depth == 0 or all(_are_dicts(inner, depth=depth - 1) for inner in value.values())
