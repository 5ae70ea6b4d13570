"""Arrow files of Hugging Face datasets (`save_to_disk`): a document in each row (rows.py).

A folder has state.json, which lists its files; folders of several splits are next to dataset_dict.json. The package
`datasets` is not needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmscale import bounded
from mmscale.data.documents.document_files import File
from mmscale.data.documents.energon import META, shards_of
from mmscale.data.documents.rows import Row, documents_of, read_columns, rows_of, with_item_states
from mmscale.data.documents.schema import TRAIN, VALIDATION, Document, Rejected
from mmscale.data.documents.slices import Format, ReadSettings, RecordRun, Scan, cut, digest_of
from mmscale.errors import DataError

_STATE, _SPLITS = "state.json", "dataset_dict.json"
_BATCH = 256  # rows taken at a time


def files_of(folder: Path) -> list[Path]:
    """Files of a folder that energon has indexed or `datasets` wrote, or the parquet files below a folder.

    Raises:
        DataError: it holds neither, a file is missing, or it has splits other than train and validation.
    """
    if (folder / META).is_dir():
        shards = [folder / name for name in shards_of(folder)]
        return [file.resolve() for file in shards]
    try:
        if (folder / _SPLITS).is_file():
            names = bounded.read_object(folder / _SPLITS)["splits"]
            other = [name for name in names if name not in (TRAIN, VALIDATION)]
            if other:
                raise DataError(
                    f"documents: {folder} has a split {other[0]}",
                    remedy=f"name the folders of the splits that you want: {folder}/{names[0]}",
                )
            return [file for name in names for file in files_of(folder / name)]
        if (folder / _STATE).is_file():
            listed = bounded.read_object(folder / _STATE)["_data_files"]
            found = [folder / Path(entry["filename"]).name for entry in listed]
        else:
            found = sorted(folder.rglob("*.parquet"))
    except (OSError, *bounded.BAD_CONTENT) as error:
        raise DataError(f"documents: {folder} cannot be read: {error}", remedy="mend or remove it") from error
    missing = [file for file in found if not file.is_file()]
    if missing or not found:
        what = (
            f"{folder} lacks {missing[0].name}"
            if missing
            else f"there is no document file in {folder}: no data set of Hugging Face and no parquet file"
        )
        raise DataError(f"documents: {what}", remedy="copy it again, or correct documents")
    return found


def _split_of(file: File) -> str | None:
    """The split that a file belongs to according to its folder."""
    if not isinstance(file, Path) or not (file.parent.parent / _SPLITS).is_file():
        return None
    return file.parent.name if file.parent.name in (TRAIN, VALIDATION) else None


def _batches(file: File) -> Iterator[Any]:
    """Record batches of an Arrow stream or file, mapped if it is local.

    Raises:
        DataError: it is neither, or damaged.
    """
    try:
        arrow, ipc = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.ipc")
    except ModuleNotFoundError as error:
        raise DataError(f"documents: reading {file.name} needs pyarrow", remedy="pip install pyarrow") from error
    source = arrow.memory_map(str(file)) if isinstance(file, Path) else file.open()
    try:
        start = source.read(6)
        source.seek(0)
        if start == b"ARROW1":
            opened = ipc.open_file(source)
            yield from (opened.get_batch(number) for number in range(opened.num_record_batches))
        else:
            yield from ipc.open_stream(source)
    except ValueError as error:  # pyarrow.ArrowInvalid
        raise DataError(f"documents: {file} is not an Arrow file: {error}", remedy="mend or remove it") from error


def _scan(file: File, slice_records: int, settings: ReadSettings) -> Scan:
    batches = list(_batches(file))  # mapped, so they take no memory
    if not batches:
        return Scan(digest_of(file), [])
    read_columns(file, batches[0].schema.names, settings)
    runs = cut(file, sum(batch.num_rows for batch in batches), slice_records, settings)
    return Scan(digest_of(file), with_item_states(file, runs, _naming_files(batches, settings), settings.columns))


def _naming_files(batches: list[Any], settings: ReadSettings) -> Iterator[Any]:
    """The content in small batches. Items that contain their bytes name no files, so those bytes are not read."""
    columns = list(settings.columns or ("content",))
    if settings.columns and all("bytes" in str(batches[0].schema.field(name).type) for name in columns):
        return
    for batch in batches:
        some = batch.select(columns)
        for at in range(0, some.num_rows, _BATCH):
            yield some.slice(at, _BATCH)


def _read(part: RecordRun) -> Iterator[Document | Rejected]:
    yield from documents_of(part, _rows(part), _split_of(part.path))


def _rows(part: RecordRun) -> Iterator[Row]:
    first, left, columns = part.first, part.count, list[str]()
    for batch in _batches(part.path):
        columns = columns or read_columns(part.path, batch.schema.names, part.settings)
        if first >= batch.num_rows:
            first -= batch.num_rows
            continue
        own = batch.select(columns).slice(first, left)
        for at in range(0, own.num_rows, _BATCH):
            yield from rows_of(own.slice(at, _BATCH))
        first, left = 0, left - own.num_rows
        if not left:
            return


ARROW = Format(_scan, _read)
