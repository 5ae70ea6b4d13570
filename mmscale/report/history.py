"""Reads metrics.jsonl as columns, for runs of millions of logged steps.

Reads the file line by line into arrays, and merges repeated steps by the rules of mmscale.runs.metrics.

Measured on 100,000 lines of 36 keys (102 MB): 0.6 s of CPU and 81 MB as columns, 1.9 s and 376 MB as the dictionaries
of `read_metrics`. On 1,000,000: 9.2 s of CPU, page included, and 0.76 GB in the process that merges.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from mmscale import bounded
from mmscale.runs.held_out import EVAL
from mmscale.runs.json_lines import is_count
from mmscale.runs.metrics import METRICS
from mmscale.runs.routes import routes
from mmscale.train.stages.stage_report import report_in, report_of

Floats = NDArray[np.float64]

_BLOCK = 8192  # lines that are converted to an array together
_PART = 64 << 20  # bytes
_PROCESSES = min(4, os.cpu_count() or 1)
_PLACE = ("step", "attempt", "rollback")  # identifies the repetition of a step
_SPENT = ("step_time_s", "save_stall_s", "eval_s", "time")


@dataclass(frozen=True)
class Lines:
    """The file's lines as written, including repeated steps; only the columns about time.

    Attributes:
        step, attempt: [N] of each line.
        columns: [N] of `step_time_s`, `save_stall_s`, `eval_s` and `time`; NaN if a line lacks it.
    """

    step: Floats
    attempt: Floats
    columns: dict[str, Floats]


@dataclass(frozen=True)
class History:
    """A run's metrics, one row per step in order; of a repeated step, the last repetition.

    Attributes:
        steps: [R] numbers of the logged steps.
        columns: [R] by key; NaN if the key was not measured, infinite if the value was not finite.
        lines: the lines as written, before steps were merged.
        torn: number of lines that are not a JSON object with a step.
        routes: whether the run's model routes; if not, its figures have no routing mode.
    """

    steps: Floats
    columns: dict[str, Floats]
    lines: Lines
    torn: int = 0
    routes: bool = True

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def attempt(self) -> int | None:
        """The attempt that wrote the last row; None if it is unknown."""
        attempts = self.of("attempt")
        return int(attempts[-1]) if len(attempts) and np.isfinite(attempts[-1]) else None

    def of(self, key: str) -> Floats:
        """A column; all NaN if the run never measured it."""
        column = self.columns.get(key)
        return column if column is not None else np.full(len(self), np.nan)

    def measured(self, key: str) -> tuple[Floats, Floats]:
        """Steps and values where a key was measured; values that are not finite are NaN."""
        column = self.of(key)
        rows = ~np.isnan(column)
        values = column[rows]
        return self.steps[rows], np.where(np.isfinite(values), values, np.nan)

    def last(self, key: str) -> float | None:
        """The latest measured value, NaN if it was not finite; None if there is none."""
        values = self.measured(key)[1]
        return float(values[-1]) if len(values) else None


def read(run: Path, *, part: int = _PART) -> History:
    """The history of a run folder, including measurements of its auxiliary stage; without rows if there are no metrics.

    Args:
        run: the folder.
        part: bytes that a process reads of a long file.
    """
    history = replace(_read_lines(run / METRICS, part=part), routes=routes(run))
    if (own := report_in(run)) is not None:  # the folder of the stage itself
        return _with(history, own.step, {where.key: value for where, value in own.losses.items()})
    if (found := report_of(run)) is not None:
        return _with(history, found.main_step, {where.key: value for where, value in found.causal().items()})
    return history


def _with(history: History, step: int, values: dict[str, float]) -> History:
    """The history with more values of a step, which gets a row if it has none; an empty history is unchanged."""
    if not len(history):
        return history
    row = int(np.searchsorted(history.steps, step))
    steps, columns = history.steps, dict(history.columns)
    if row == len(steps) or steps[row] != step:
        attempt = history.of("attempt")[max(0, row - 1)]
        steps = np.insert(steps, row, step)
        columns = {key: np.insert(column, row, np.nan) for key, column in columns.items()}
        if "attempt" in columns:
            columns["attempt"][row] = attempt
    for key, value in values.items():
        column = columns.get(key)
        columns[key] = np.full(len(steps), np.nan) if column is None else column.copy()
        columns[key][row] = value
    return replace(history, steps=steps, columns=columns)


def _read_lines(file: Path, *, part: int) -> History:
    if not file.is_file():
        return _merged([])
    size = file.stat().st_size
    begins = range(0, max(size, 1), part)
    if len(begins) == 1:
        return _merged([_read_part(file, 0, size)])
    # Forked, because a fresh interpreter would import everything again. No thread has been started here.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(min(_PROCESSES, len(begins)), mp_context=context) as pool:
        return _merged(
            list(pool.map(_read_part, *zip(*((file, begin, begin + part) for begin in begins), strict=True)))
        )


def _read_part(file: Path, begin: int, end: int) -> _Tables:
    """The lines that begin within [begin, end) bytes of a file."""
    tables = _Tables()
    with file.open("rb") as lines:
        if begin:
            lines.seek(begin - 1)
            lines.readline()  # the rest of a line that began before
        place = lines.tell()
        for line in bounded.lines(lines):
            if place >= end:
                break
            tables.add(place, line)
            place += len(line)
    tables.flush()
    return tables


@dataclass
class _Table:
    """Lines with the same keys in the same order."""

    keys: tuple[str, ...]
    places: list[int] = field(default_factory=list)  # positions in the file, which give their order
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    blocks: list[Floats] = field(default_factory=list)  # each [keys, lines]

    def flush(self) -> None:
        if not self.rows:
            return
        try:
            block = np.array(self.rows, dtype=np.float64)
        except (ValueError, TypeError, OverflowError):  # a string or a list instead of a number
            block = np.array([[_number(value) for value in row] for row in self.rows])
        block[np.isnan(block)] = np.inf  # the value was written, so it was measured and not finite
        self.blocks.append(np.ascontiguousarray(block.T))
        self.rows.clear()


class _Tables:
    def __init__(self) -> None:
        self.by_keys: dict[tuple[str, ...], _Table] = {}
        self.torn = 0

    def add(self, place: int, line: bytes) -> None:
        try:
            record = orjson.loads(line)
        except ValueError:
            self.torn += not line.isspace()
            return
        if type(record) is not dict or "step" not in record or not _is_placed(record):
            self.torn += 1
            return
        keys = tuple(record)
        table = self.by_keys.get(keys)
        if table is None:
            table = self.by_keys[keys] = _Table(keys)
        table.places.append(place)
        table.rows.append(tuple(record.values()))
        if len(table.rows) >= _BLOCK:
            table.flush()

    def flush(self) -> None:
        for table in self.by_keys.values():
            table.flush()


def _is_placed(record: dict[str, Any]) -> bool:
    return is_count(record["step"]) and is_count(record.get("attempt", 0)) and is_count(record.get("rollback", 0))


def _number(value: Any) -> float:
    try:
        return float(value)
    except (ValueError, TypeError, OverflowError):
        return np.nan


@dataclass(frozen=True)
class _Place:
    """The rows of the history that a table's lines belong to."""

    columns: dict[str, Floats]
    row: NDArray[np.int64]
    turn: NDArray[np.int64]  # index of the line among the accepted lines of its step; -1: superseded


def _merged(parts: list[_Tables]) -> History:
    torn = sum(part.torn for part in parts)
    found = []
    for keys in dict.fromkeys(keys for part in parts for keys in part.by_keys):
        some = [part.by_keys.pop(keys) for part in parts if keys in part.by_keys]
        blocks = [block for table in some for block in table.blocks]
        columns = {key: np.concatenate([block[i] for block in blocks]) for i, key in enumerate(keys)}
        found.append((columns, np.concatenate([np.array(table.places) for table in some])))
    if not found:
        return History(np.zeros(0), {}, Lines(np.zeros(0), np.zeros(0), {}), torn)
    order = np.concatenate([numbers for _, numbers in found])
    step, attempt, rollback = (
        np.concatenate([columns.get(name, np.zeros(len(numbers))) for columns, numbers in found]) for name in _PLACE
    )
    # A line with only held-out values is added to its step instead of replacing it.
    whole = np.concatenate([np.full(len(numbers), _is_whole(columns)) for columns, numbers in found])
    steps, row = np.unique(step, return_inverse=True)
    time = attempt * 2.0**20 + rollback
    newest = np.full(len(steps), -np.inf)
    np.maximum.at(newest, row[whole], time[whole])
    turn = _turns(row, time, order, accepted=time >= newest[row])
    columns = _filled(list(_places(found, row, turn)), rows=len(steps), turns=int(turn.max()) + 1)
    return History(steps, columns, _raw(found, order, step, attempt), torn)


def _is_whole(columns: dict[str, Floats]) -> bool:
    return not all(key.startswith(EVAL) for key in columns if key not in _PLACE)


def _turns(
    row: NDArray[np.int64], time: Floats, order: NDArray[np.int64], *, accepted: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """For each line its index among the accepted lines of its step, older ones first; -1 if it is not accepted."""
    turn = np.full(len(row), -1)
    places = np.flatnonzero(accepted)
    places = places[np.lexsort((order[places], time[places], row[places]))]
    own = row[places]
    first = np.searchsorted(own, own)
    turn[places] = np.arange(len(own)) - first
    return turn


def _places(
    found: list[tuple[dict[str, Floats], NDArray[np.int64]]], row: NDArray[np.int64], turn: NDArray[np.int64]
) -> Iterator[_Place]:
    begin = 0
    for columns, numbers in found:
        end = begin + len(numbers)
        yield _Place(columns, row[begin:end], turn[begin:end])
        begin = end


def _filled(places: list[_Place], *, rows: int, turns: int) -> dict[str, Floats]:
    """Columns by key; values of later lines of a step replace those of earlier ones."""
    columns: dict[str, Floats] = {}
    for turn in range(turns):
        for place in places:
            lines = np.flatnonzero(place.turn == turn)
            if not len(lines):
                continue
            for key, values in place.columns.items():
                if key not in columns:
                    columns[key] = np.full(rows, np.nan)
                columns[key][place.row[lines]] = values[lines]
    columns.pop("step", None)
    return columns


def _raw(
    found: list[tuple[dict[str, Floats], NDArray[np.int64]]], order: NDArray[np.int64], step: Floats, attempt: Floats
) -> Lines:
    by_line = np.argsort(order)
    columns = {
        name: np.concatenate([columns.get(name, np.full(len(numbers), np.nan)) for columns, numbers in found])[by_line]
        for name in _SPENT
    }
    return Lines(step[by_line], attempt[by_line], columns)
