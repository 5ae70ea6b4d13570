"""Parquet: a document in each row (rows.py)."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmscale.data.documents.document_files import File, size_of
from mmscale.data.documents.rows import Row, documents_of, read_columns, rows_of, with_item_states
from mmscale.data.documents.schema import Document, Rejected
from mmscale.data.documents.slices import Format, ReadSettings, RecordRun, Scan, cut, digest_of
from mmscale.errors import DataError

_ROWS_A_BYTE = 8  # upper bound of rows per byte of a file; nulls take almost no space
_BATCH = 256  # rows decoded at a time


def _open(file: File) -> Any:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise DataError(f"documents: reading {file.name} needs pyarrow", remedy="pip install pyarrow") from error
    try:
        return parquet.ParquetFile(file if isinstance(file, Path) else file.open())
    except ValueError as error:  # pyarrow.ArrowInvalid
        raise DataError(f"documents: {file} is not a parquet file: {error}", remedy="mend or remove it") from error


def _scan(file: File, slice_records: int, settings: ReadSettings) -> Scan:
    opened = _open(file)
    read_columns(file, opened.schema_arrow.names, settings)
    runs = cut(file, _rows(file, opened), slice_records, settings)
    named = _naming_files(opened, settings)
    if named:
        batches = opened.iter_batches(batch_size=_BATCH, columns=named)
        runs = with_item_states(file, runs, batches, settings.columns)
    return Scan(digest_of(file), runs)


def _naming_files(opened: Any, settings: ReadSettings) -> list[str]:
    """Columns that may name files: `path` inside the content. The bytes of items are not read for that."""
    columns = settings.columns or ("content",)
    leaves = [opened.schema.column(index).path for index in range(len(opened.schema))]
    with_bytes = {leaf.rpartition(".")[0] for leaf in leaves if leaf.endswith(".bytes")}
    return [
        leaf
        for leaf in leaves
        if leaf.split(".")[0] in columns
        and (leaf == "content" or leaf.endswith(".path"))
        and not (settings.columns and leaf.rpartition(".")[0] in with_bytes)
    ]


def _rows(file: File, opened: Any) -> int:
    """Number of records of a parquet file.

    Raises:
        DataError: the file claims more than its size allows; lists of that length would be allocated.
    """
    rows: int = opened.metadata.num_rows
    if not 0 <= rows <= _ROWS_A_BYTE * size_of(file):
        raise DataError(
            f"documents: {file} says that it has {rows:,} rows, in {size_of(file):,} bytes",
            remedy="mend or remove it",
        )
    return rows


class _Rows:
    """Rows of one row group, starting at one of them. Slices of a group that are read in order decode it once.

    Attributes:
        at: number of the next row, in its file.
    """

    def __init__(self, opened: Any, group: int, at: int, columns: list[str]) -> None:
        self.at = at
        self._batches = opened.iter_batches(batch_size=_BATCH, row_groups=[group], columns=columns)
        self._batch: Any = None
        self._used = 0

    def take(self, first: int, count: int) -> Iterator[Row]:
        """Rows first..first+count-1 of the file; a string instead of a row says why it cannot be read."""
        while count:
            if self._batch is None or self._used == self._batch.num_rows:
                self._batch, self._used = next(self._batches), 0
                continue
            skipped = min(first - self.at, self._batch.num_rows - self._used)
            self._used, self.at = self._used + skipped, self.at + skipped
            if self.at < first:
                continue
            some = self._batch.slice(self._used, min(count, self._batch.num_rows - self._used))
            self._used, self.at = self._used + some.num_rows, self.at + some.num_rows
            first, count = first + some.num_rows, count - some.num_rows
            yield from rows_of(some)


# The row group that this process has read last, with the position in it.
_latest: dict[tuple[str, str, int], _Rows] = {}


def _version(file: File) -> str:
    return str(file.stat().st_mtime_ns) if isinstance(file, Path) else file.version


def _rows_of(part: RecordRun, opened: Any, group: int, group_start: int, columns: list[str]) -> _Rows:
    key = (str(part.path), _version(part.path), group)
    rows = _latest.pop(key, None)
    _latest.clear()
    if rows is None or rows.at > max(part.first, group_start):
        rows = _Rows(opened, group, group_start, columns)
    _latest[key] = rows
    return rows


def _read(part: RecordRun) -> Iterator[Document | Rejected]:
    opened = _open(part.path)
    yield from documents_of(part, _all_rows(part, opened))


def _all_rows(part: RecordRun, opened: Any) -> Iterator[Row]:
    columns = read_columns(part.path, opened.schema_arrow.names, part.settings)
    end, group_start = part.first + part.count, 0
    for group in range(opened.num_row_groups):
        rows = opened.metadata.row_group(group).num_rows
        low, high = max(part.first, group_start), min(end, group_start + rows)
        if low < high:
            yield from _rows_of(part, opened, group, group_start, columns).take(low, high - low)
        group_start += rows


PARQUET = Format(_scan, _read)
