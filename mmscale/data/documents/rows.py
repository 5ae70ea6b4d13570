"""Rows of tables (parquet, Arrow) as documents: the columns are keys of a document, or are combined to its content."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from mmscale import bounded
from mmscale.data.documents.chat import CHATS
from mmscale.data.documents.document_files import File, resolver_of
from mmscale.data.documents.schema import (
    CHAT_KEYS,
    CONTENT_KEYS,
    KEYS,
    SUFFIXES,
    Document,
    Rejected,
    named_files,
    parse_document,
)
from mmscale.data.documents.slices import ItemStates, ReadSettings, RecordRun
from mmscale.errors import DataError

_OWN = tuple(key for key in KEYS if key not in ("content", "metadata"))

Row = Mapping[str, Any] | str  # a string instead of a row says why it cannot be read


def read_columns(file: File, names: Sequence[str], settings: ReadSettings) -> list[str]:
    """The columns to read.

    Args:
        file: for messages.
        names: of its columns.
        settings: `columns` and `ignore`.

    Raises:
        DataError: there is no content, or a column is not a key of documents.
    """
    if settings.columns:
        missing = [name for name in settings.columns if name not in names]
        if missing:
            raise DataError(
                f"documents: {file} has no column {missing[0]}, only {', '.join(names)}",
                remedy="correct data.prepare.columns",
            )
        return [*settings.columns, *(name for name in names if name in _OWN and name not in settings.columns)]
    if not set(CONTENT_KEYS) & set(names):
        raise DataError(
            f"documents: {file} has no column named content (nor {' or '.join(CHATS)}), only {', '.join(names)}",
            remedy="name the columns that make up a document in their order, e.g. data.prepare.columns=[image,text]",
        )
    keys = KEYS if "content" in names else (*KEYS, *CHAT_KEYS)
    unknown = [name for name in names if name not in keys and name not in settings.ignore]
    if unknown:
        raise DataError(
            f"documents: {file} has columns that are no keys of documents: {', '.join(unknown)}",
            remedy=f"rename them ({', '.join(keys)}), or data.prepare.ignore=[{','.join(unknown)}]",
        )
    return [name for name in names if name in keys and name != "metadata"]


def rows_of(batch: Any) -> list[Row]:
    """Rows of a record batch.

    A string instead of a row says why it cannot be converted, e.g. text that is not UTF-8.
    """
    try:
        found: list[Row] = batch.to_pylist()
        return found
    except (ValueError, OverflowError, TypeError):
        pass
    rows: list[Row] = []
    for number in range(batch.num_rows):
        try:
            rows += batch.slice(number, 1).to_pylist()
        except UnicodeDecodeError:
            rows.append("a text is not UTF-8")
        except (ValueError, OverflowError, TypeError) as error:
            rows.append(f"the row cannot be read: {error}")
    return rows


def documents_of(part: RecordRun, rows: Iterable[Row], split: str | None = None) -> Iterator[Document | Rejected]:
    """Documents of the rows of a run.

    Args:
        part: the run.
        rows: its rows.
        split: of rows that name none; None: the split in the name of the file.
    """
    resolve, split = resolver_of(part.path), split or part.split
    for number, row in enumerate(rows, start=part.first):
        where = f"{part.path.name}:{number}"
        if isinstance(row, str):
            yield Rejected(where, where, row)
            continue
        record = _record(row, part.settings.columns)
        if split is not None and record.get("split") is None:
            record = {**record, "split": split}
        ignore = part.settings.ignore  # of messages: columns were chosen by their names already
        yield parse_document(record, where=where, fallback_id=where, resolve=resolve, ignore=ignore)


def with_item_states(
    file: File, runs: list[RecordRun], batches: Iterable[Any], columns: tuple[str, ...]
) -> list[RecordRun]:
    """The runs, with the state of the files that their rows name.

    Args:
        file: of the runs.
        runs: all of them.
        batches: all rows, with the columns that name files.
        columns: `data.prepare.columns`.
    """
    states, found, row = ItemStates(file), list[RecordRun](), 0
    ends = {run.first + run.count: run for run in runs}
    for batch in batches:
        for record in rows_of(batch):
            states.add([] if isinstance(record, str) else _named(_record(record, columns)))
            row += 1
            if row in ends:
                found.append(replace(ends[row], items=states.take()))
    return found if len(found) == len(runs) else runs


def _record(row: Mapping[str, Any], columns: Sequence[str]) -> Mapping[str, Any]:
    plain = dict(row)
    # An integer column with missing values becomes a column of floats.
    if isinstance(plain.get("id"), float) and plain["id"].is_integer():
        plain["id"] = int(plain["id"])
    if columns:
        values = [_codes(name, row.get(name)) for name in columns]
        content = [piece for value in _in_order(values) for piece in _pieces(value)]
        return {name: plain[name] for name in _OWN if name in plain and name not in columns} | {"content": content}
    for key in ("content", "loss", *CHAT_KEYS):  # may be columns of JSON text, so that a table needs no nested schema
        value = plain.get(key)
        if isinstance(value, str) and value[:1] in "[{":
            try:
                plain[key] = bounded.parse_json(value)
            except ValueError:
                plain[key] = None
    return plain


def _named(record: Mapping[str, Any]) -> list[Any]:
    try:
        return named_files(record)
    except (TypeError, AttributeError):
        return []


def _codes(name: str, value: Any) -> Any:
    """A list of integers means the codes of an item, whose modality is the name of the column."""
    if isinstance(value, list) and value and all(type(one) is int for one in value):
        return {"type": "tokens", "modality": name, "ids": value}
    return value


def _in_order(values: list[Any]) -> list[Any]:
    """The values of the columns. Lists of the same length are interleaved; an entry may be null."""
    lists = [value for value in values if isinstance(value, list)]
    if len(lists) == len(values) > 1 and len({len(one) for one in lists}) == 1:
        return [value for several in zip(*lists, strict=True) for value in several]
    return values


def _pieces(value: Any) -> Iterator[Any]:
    """Pieces of content in one value: a text, a file as `{bytes, path}`, several of them, or nothing."""
    if isinstance(value, str):
        yield {"type": "text", "text": value}
    elif isinstance(value, Mapping) and value.get("type") != "tokens" and ("bytes" in value or "path" in value):
        suffix = PurePosixPath(str(value.get("path") or "")).suffix.lower().removeprefix(".")
        yield {"type": SUFFIXES.get(suffix, "image"), "bytes": value.get("bytes"), "path": value.get("path")}
    elif isinstance(value, list):
        for one in value:
            yield from _pieces(one)
    elif value is not None:
        yield value  # `parse_document` refuses it and reports its position
