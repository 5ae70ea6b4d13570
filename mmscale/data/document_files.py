"""Document files (JSONL, parquet, WebDataset tar): listing them, cutting them into slices, reading a slice.

Every slice can be read without reading what stands before it. What a record may hold is documents.py. No torch here.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib
import io
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal

from mmscale import bounded
from mmscale.data.documents import (
    KEYS,
    BadDocumentError,
    Document,
    Rejected,
    Resolver,
    folder_resolver,
    parse_document,
)
from mmscale.errors import DataError

Kind = Literal["jsonl", "parquet", "tar"]
_KINDS: dict[str, Kind] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".tar": "tar"}
_IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm")
_OF_A_PAIR = ("id", "loss", "group", "split")  # keys of a pair's .json that are read beside its caption
_READ_BYTES = 1 << 20
# Bounds on one record, whatever a file promises: a sparse archive of 2 kB may claim members of 20 GB.
MOST_LINE = 64 << 20  # bytes of JSON
MOST_SAMPLE = 256 << 20  # bytes of all members of a sample of an archive
MOST_MEMBERS = 10_000  # of a sample
_ROWS_A_BYTE = 8  # of a parquet file, at most: nulls take no room


@dataclass(frozen=True)
class FileSlice:
    """Records first..first+count-1 of one file.

    Attributes:
        digest: SHA-256 of the whole file.
        offset: byte at which the first record starts (jsonl, tar).
        ignore: keys of a record that are not read.
    """

    path: Path
    kind: Kind
    digest: str
    first: int
    count: int
    offset: int = 0
    ignore: tuple[str, ...] = ()

    @property
    def identity(self) -> str:
        """File content and the run of records; neither folder nor modification time."""
        return f"{self.path.name}:{self.digest}:{self.first}+{self.count}"

    def read(self) -> Iterator[Document | Rejected]:
        """The slice's documents and rejections.

        Raises:
            DataError: the file is gone, or not even a file of its kind.
        """
        readers = {"jsonl": _read_jsonl, "parquet": _read_parquet, "tar": _read_tar}
        try:
            yield from readers[self.kind](self)
        except (OSError, tarfile.TarError) as error:
            raise DataError(f"documents: {self.path} cannot be read: {error}", remedy="mend or remove it") from error


def list_files(patterns: Sequence[str]) -> list[Path]:
    """Document files in the given order; what a glob finds is sorted, a file named twice is read once.

    Raises:
        DataError: a name matches nothing, or a file is of no known kind.
    """
    if not patterns:
        raise DataError("data.prepare: source is documents, but no document file is named", remedy="set documents")
    found: dict[Path, None] = {}
    for pattern in patterns:
        matches = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 absolute patterns
        files = [Path(match) for match in matches if Path(match).is_file()]
        if not files:
            raise DataError(f"data.prepare: there is no document file {pattern}", remedy="correct documents")
        for file in files:
            if file.suffix not in _KINDS:
                known = ", ".join(_KINDS)
                raise DataError(f"data.prepare: {file} is of no known kind", remedy=f"name files that end in {known}")
            found.setdefault(file.resolve())
    return list(found)


def scan_files(
    files: Sequence[Path], *, slice_records: int, threads: int = 2, ignore: tuple[str, ...] = ()
) -> list[FileSlice]:
    """Digest every file once and cut it into slices.

    Args:
        files: as from `list_files`.
        slice_records: records of a slice, at most.
        threads: files read at a time (hashing releases the interpreter lock).
        ignore: keys of a record that are not read.

    Raises:
        DataError: a file cannot be read or is damaged as a whole.
    """
    with ThreadPoolExecutor(threads) as pool:
        return [part for parts in pool.map(lambda file: _scan(file, slice_records, ignore), files) for part in parts]


def _scan(file: Path, slice_records: int, ignore: tuple[str, ...]) -> list[FileSlice]:
    kind = _KINDS[file.suffix]
    try:
        if kind == "jsonl":
            digest, starts, total = _scan_jsonl(file, slice_records)
        elif kind == "parquet":
            opened = _open_parquet(file)
            _check_columns(file, opened.schema_arrow.names, ignore)
            total = _rows(file, opened)
            digest, starts = _digest(file), [0] * -(-total // slice_records)
        else:
            digest = _digest(file)
            starts, total = _scan_tar(file, slice_records)
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"documents: {file} cannot be read: {error}", remedy="mend or remove it") from error
    return [
        FileSlice(
            file,
            kind,
            digest,
            index * slice_records,
            min(slice_records, total - index * slice_records),
            start,
            ignore,
        )
        for index, start in enumerate(starts)
    ]


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------- JSONL


def _scan_jsonl(file: Path, slice_records: int) -> tuple[str, list[int], int]:
    digest, starts, lines, offset = hashlib.sha256(), list[int](), 0, 0
    begins = True
    with file.open("rb", buffering=_READ_BYTES) as stream:
        for piece in bounded.lines(stream):
            if begins and lines % slice_records == 0:
                starts.append(offset)
            lines += begins
            digest.update(piece)
            offset += len(piece)
            begins = piece.endswith(b"\n")
    return digest.hexdigest(), starts, lines


def _read_line(stream: BinaryIO) -> bytes | None:
    """The next line; None for one that is longer than MOST_LINE, of which nothing is kept."""
    line = piece = stream.readline(MOST_LINE)
    while len(piece) == MOST_LINE and not piece.endswith(b"\n"):
        piece = stream.readline(MOST_LINE)
    return line if piece is line else None


def _read_jsonl(part: FileSlice) -> Iterator[Document | Rejected]:
    resolve = folder_resolver(part.path.parent)
    with part.path.open("rb", buffering=_READ_BYTES) as stream:
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
            yield parse_document(record, where=where, fallback_id=where, resolve=resolve, ignore=part.ignore)


# -------------------------------------------------------------------------------------------------------- parquet


def _open_parquet(file: Path) -> Any:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise DataError(f"documents: reading {file.name} needs pyarrow", remedy="pip install pyarrow") from error
    try:
        opened = parquet.ParquetFile(file)
    except ValueError as error:  # pyarrow.ArrowInvalid
        raise DataError(f"documents: {file} is not a parquet file: {error}", remedy="mend or remove it") from error
    if "content" not in opened.schema_arrow.names:
        columns = ", ".join(opened.schema_arrow.names)
        raise DataError(f"documents: {file} has no column named content, only {columns}", remedy="see the README")
    return opened


def _check_columns(file: Path, columns: Sequence[str], ignore: Sequence[str]) -> None:
    unknown = [name for name in columns if name not in KEYS and name not in ignore]
    if unknown:
        raise DataError(
            f"documents: {file} has columns that are no keys of documents: {', '.join(unknown)}",
            remedy=f"rename them ({', '.join(KEYS)}), or data.prepare.ignore=[{','.join(unknown)}]",
        )


def _rows(file: Path, opened: Any) -> int:
    """Records of a parquet file.

    Raises:
        DataError: it promises more than it has room for; lists of that length are made of them.
    """
    rows: int = opened.metadata.num_rows
    if not 0 <= rows <= _ROWS_A_BYTE * file.stat().st_size:
        raise DataError(
            f"documents: {file} says that it has {rows:,} rows, in {file.stat().st_size:,} bytes",
            remedy="mend or remove it",
        )
    return rows


def _read_parquet(part: FileSlice) -> Iterator[Document | Rejected]:
    resolve = folder_resolver(part.path.parent)
    opened = _open_parquet(part.path)
    columns = [name for name in opened.schema_arrow.names if name in KEYS and name != "metadata"]
    end, group_start = part.first + part.count, 0
    for group in range(opened.num_row_groups):
        rows = opened.metadata.row_group(group).num_rows
        low, high = max(part.first, group_start), min(end, group_start + rows)
        if low < high:
            table = opened.read_row_group(group, columns=columns).slice(low - group_start, high - low)
            for number, record in enumerate(table.to_pylist(), start=low):
                where = f"{part.path.name}:{number}"
                yield parse_document(_plain(record), where=where, fallback_id=where, resolve=resolve)
        group_start += rows


def _plain(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """`content` and `loss` may be columns of JSON text, which needs no nested schema."""
    plain = dict(record)
    for key in ("content", "loss"):
        value = plain.get(key)
        if isinstance(value, str) and value[:1] in "[{":
            try:
                plain[key] = bounded.parse_json(value)
            except ValueError:
                plain[key] = None
    return plain


# ------------------------------------------------------------------------------------------------- WebDataset tar


def _samples(archive: tarfile.TarFile) -> Iterator[tuple[str, list[tarfile.TarInfo]]]:
    """Neighbouring regular members that share the name up to the first dot of the file name (WebDataset's rule)."""
    key, members, end = "", list[tarfile.TarInfo](), -1
    for member in archive:
        archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it saw
        if member.size < 0 or member.offset <= end:  # it would be read again and again
            raise tarfile.ReadError(f"{member.name} has an impossible size")
        end = member.offset
        if not member.isreg():  # links and devices are never followed
            continue
        path = PurePosixPath(member.name)
        name = str(path.parent / path.name.split(".", 1)[0])
        if members and name != key:
            yield key, members
            members = []
        key = name
        if len(members) <= MOST_MEMBERS:
            members.append(member)
    if members:
        yield key, members


class _Stream(io.BufferedReader):
    """A file of which no more is read at once than a sample may have: headers may promise anything."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MOST_SAMPLE:
            raise tarfile.ReadError(f"a header or a member of {size} bytes")
        return super().read(size)


@contextlib.contextmanager
def _open_tar(file: Path, *, offset: int = 0) -> Iterator[tarfile.TarFile]:
    """An archive, read from an offset on.

    Raises:
        tarfile.TarError: whatever is wrong with it. tarfile raises almost anything on damaged headers.
    """
    try:
        with _Stream(io.FileIO(file)) as stream:
            stream.seek(offset)
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                yield archive
    except (EOFError, MemoryError, *bounded.BAD_CONTENT) as error:
        raise tarfile.ReadError(f"it is damaged ({type(error).__name__}: {error})") from error


def _scan_tar(file: Path, slice_records: int) -> tuple[list[int], int]:
    starts, total = [], 0
    with _open_tar(file) as archive:
        for _, members in _samples(archive):
            if total % slice_records == 0:
                starts.append(members[0].offset)
            total += 1
    return starts, total


def _read_tar(part: FileSlice) -> Iterator[Document | Rejected]:
    with _open_tar(part.path, offset=part.offset) as archive:
        for number, (key, members) in enumerate(_samples(archive)):
            if number == part.count:
                return
            where = f"{part.path.name}:{key}"
            if reason := _too_large(members):
                yield Rejected(where, key, reason)
                continue
            files = {}
            for member in members:
                opened = archive.extractfile(member)
                assert opened is not None  # regular members only
                files[PurePosixPath(member.name).name.partition(".")[2]] = opened.read()
            yield _parse_sample(key, files, where=where, ignore=part.ignore)


def _too_large(members: Sequence[tarfile.TarInfo]) -> str:
    """Why the members of a sample are not read; "" if they are."""
    if any(member.issparse() for member in members):
        return "a member is sparse: it may claim any size"
    total = sum(member.size for member in members)
    if total > MOST_SAMPLE:
        return f"the sample has {total:,} bytes, more than {MOST_SAMPLE:,}"
    return f"the sample has more than {MOST_MEMBERS:,} members" if len(members) > MOST_MEMBERS else ""


def _parse_sample(
    key: str, files: Mapping[str, bytes], *, where: str, ignore: Sequence[str] = ()
) -> Document | Rejected:
    """A sample with a .json that has `content` is a document; else its text and its image are a pair."""
    record: Any = {}
    if "json" in files:
        try:
            record = bounded.parse_json(files["json"])
        except ValueError as error:
            return Rejected(where, key, f"broken JSON: {error}")
    if not isinstance(record, Mapping) or "content" not in record:
        record = _pair(key, files, record if isinstance(record, Mapping) else {})
    return parse_document(record, where=where, fallback_id=key, resolve=_sample_resolver(key, files), ignore=ignore)


def _pair(key: str, files: Mapping[str, bytes], record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Caption and image, either one first: half of the pairs teach drawing, half describing (by a hash of the key).

    The .json of a pair describes the picture in keys of its maker; those that are not a document's are not read.
    """
    caption = files["txt"].decode("utf-8", "replace") if "txt" in files else record.get("caption", "")
    content: list[dict[str, Any]] = [{"type": "text", "text": caption}]
    content += [{"type": "image", "path": suffix} for suffix in files if suffix.lower() in _IMAGE_SUFFIXES]
    if hashlib.sha256(key.encode()).digest()[0] % 2:
        content.reverse()
    return {"id": key, "content": content} | {name: record[name] for name in _OF_A_PAIR if name in record}


def _sample_resolver(key: str, files: Mapping[str, bytes]) -> Resolver:
    """Image paths name a member of the same sample: "png", "a1.png" or "folder/a1.png"."""
    path = PurePosixPath(key)

    def resolve(name: str) -> bytes:
        for prefix in ("", f"{path.name}.", f"{path}."):
            if name.startswith(prefix) and name[len(prefix) :] in files:
                return files[name[len(prefix) :]]
        raise BadDocumentError(f"image {name} is missing from sample {key} of the archive")

    return resolve
