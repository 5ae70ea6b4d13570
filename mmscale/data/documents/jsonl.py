"""JSONL, plain or compressed by gzip or zstd: a document in each line.

When a file is cut into runs, lines that name files are parsed, so that later changes of those files are noticed.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any, BinaryIO

from mmscale import bounded
from mmscale.data.documents.document_files import READ_BYTES, File, resolver_of
from mmscale.data.documents.schema import Document, Rejected, named_files, parse_document
from mmscale.data.documents.slices import Format, ItemStates, ReadSettings, RecordRun, Scan, digest_of
from mmscale.errors import DataError

MOST_LINE = 64 << 20  # longest line [bytes]
_NAMES_FILES = (b'"path"', b'"image":', b'"images":', b'"image_url"')  # a line with one of these may name files


def _zstd(file: File) -> BinaryIO:
    try:
        pyarrow = importlib.import_module("pyarrow")
    except ModuleNotFoundError as error:
        raise DataError(f"documents: reading {file.name} needs pyarrow", remedy="pip install pyarrow") from error
    stream = pyarrow.input_stream(file.open("rb"), compression="zstd", buffer_size=READ_BYTES)
    return io.BufferedReader(stream, READ_BYTES)


def _gzip(file: File) -> Any:
    return gzip.GzipFile(fileobj=file.open("rb"))


_PACKED: Mapping[str, Callable[[File], Any]] = {".gz": _gzip, ".zst": _zstd}


def _open(file: File) -> Any:
    return _PACKED[file.suffix](file) if file.suffix in _PACKED else file.open("rb", buffering=READ_BYTES)


def _scan(file: File, slice_records: int, settings: ReadSettings) -> Scan:
    """Runs of `slice_records` lines. A compressed file is one run, because reading cannot start in its middle."""
    packed = file.suffix in _PACKED
    digest, lines, offset, begins = hashlib.sha256(), 0, 0, True
    starts, items, states = list[tuple[int, int]](), list[str](), ItemStates(file)
    with _open(file) as stream:
        for piece in bounded.lines(stream):
            if begins and (lines == 0 if packed else lines % slice_records == 0):
                if starts:
                    items.append(states.take())
                starts.append((lines, offset))
            lines += begins
            if not packed:
                digest.update(piece)
            offset += len(piece)
            if any(key in piece for key in _NAMES_FILES):
                states.add(_named(piece))
            begins = piece.endswith(b"\n")
    items.append(states.take())
    ends = [*starts, (lines, offset)]
    runs = [
        RecordRun(file, first, end - first, start, settings, items=state)
        for ((first, start), (end, _)), state in zip(pairwise(ends), items, strict=False)
    ]
    return Scan(digest_of(file) if packed else digest.hexdigest(), runs)


def _named(line: bytes) -> list[Any]:
    """Paths of items in a line; empty if it is not a document."""
    try:
        return named_files(bounded.parse_json(line))
    except bounded.BAD_CONTENT:
        return []


def _read_line(stream: BinaryIO) -> bytes | None:
    """The next line; None for one longer than MOST_LINE, which is discarded."""
    line = piece = stream.readline(MOST_LINE)
    while len(piece) == MOST_LINE and not piece.endswith(b"\n"):
        piece = stream.readline(MOST_LINE)
    return line if piece is line else None


def _read(part: RecordRun) -> Iterator[Document | Rejected]:
    resolve = resolver_of(part.path)
    with _open(part.path) as stream:
        if part.offset:
            stream.seek(part.offset)
        for number in range(part.first + 1, part.first + part.count + 1):
            line = _read_line(stream)
            where = f"{part.path.name}:{number}"
            if line is None:
                yield Rejected(where, where, f"the line is longer than {MOST_LINE:,} bytes")
                continue
            if not line.strip():
                continue
            try:
                record = bounded.parse_json(line)
            except ValueError as error:  # ValueError: not UTF-8 or not JSON
                reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else f"broken JSON: {error}"
                yield Rejected(where, where, reason)
                continue
            yield parse_document(record, where=where, fallback_id=where, resolve=resolve, ignore=part.settings.ignore)


JSONL = Format(_scan, _read)
