"""The table of formats of document files; lists files and cuts them into slices.

Every slice can be read without reading the slices before it. schema.py checks records. No torch here.
"""

from __future__ import annotations

import glob
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from mmscale.data.documents import arrow
from mmscale.data.documents.arrow import ARROW
from mmscale.data.documents.document_files import File, is_remote, list_remote, version_of
from mmscale.data.documents.hub_splits import refuse_other_splits, splits_of
from mmscale.data.documents.jsonl import JSONL
from mmscale.data.documents.parquet import PARQUET
from mmscale.data.documents.schema import Document, Rejected, SplitName
from mmscale.data.documents.slices import Format, ReadSettings, RecordRun
from mmscale.data.documents.webdataset import WEBDATASET
from mmscale.errors import DataError, missing

FORMATS: dict[str, Format] = {
    ".jsonl": JSONL,
    ".ndjson": JSONL,
    ".jsonl.gz": JSONL,
    ".ndjson.gz": JSONL,
    ".jsonl.zst": JSONL,
    ".ndjson.zst": JSONL,
    ".parquet": PARQUET,
    ".arrow": ARROW,
    ".tar": WEBDATASET,
}
_UNREADABLE = (OSError, EOFError, zlib.error, tarfile.TarError)
_DEFAULT = ReadSettings()


@dataclass(frozen=True)
class FileSlice:
    """A run of records of one file.

    Attributes:
        suffix: of the file's name, in FORMATS.
        digest: SHA-256 of the whole file.
        run: the records.
        version: of the file when it was digested; "": not compared.
    """

    suffix: str
    digest: str
    run: RecordRun
    version: str = ""

    @property
    def count(self) -> int:
        """Number of records."""
        return self.run.count

    @property
    def identity(self) -> str:
        """File content, range of records, and their split; independent of folder and modification time."""
        # Identities without a split are those of versions that did not read it.
        split = f":{self.run.split}" if self.run.split else ""
        return f"{self.run.path.name}:{self.digest}:{self.run.first}+{self.run.count}{split}"

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks of the format about the file, for the user."""
        return getattr(self.run.facts, "notes", ())

    @property
    def items(self) -> str:
        """State of the files that the records name; "": they name none."""
        return self.run.items

    def read(self) -> Iterator[Document | Rejected]:
        """The slice's documents and rejections.

        Raises:
            DataError: the file is gone, is not of its format, or has changed since it was digested.
        """
        try:
            yield from FORMATS[self.suffix].read(self.run)
            if self.version and version_of(self.run.path) != self.version:
                raise DataError(
                    f"documents: {self.run.path} has changed while it was read",
                    remedy="run the same command again when nobody writes to it",
                )
        except _UNREADABLE as error:
            raise _unreadable(self.run.path, error) from error


def list_files(patterns: Sequence[str]) -> list[File]:
    """Document files in the given order; results of a glob are sorted, and a file named twice is read once.

    A name may be a URL, and a folder of Hugging Face datasets.

    Raises:
        DataError: a name matches nothing, or a file has no known format.
    """
    found: dict[File, None] = {}
    for pattern in _named(patterns):
        files: Sequence[File]
        if is_remote(pattern):
            files = list_remote(pattern)
        elif Path(pattern).is_dir():
            files = [file.resolve() for file in arrow.files_of(Path(pattern))]
        else:
            files = _local(pattern)
        for file in files:
            if not _suffix(file):
                raise DataError(
                    f"data.prepare: {file} is of no known kind",
                    remedy=f"name files that end in {', '.join(FORMATS)}, or set data.prepare.reader",
                )
            found.setdefault(file)
        if not files:
            raise _none(pattern)
        refuse_other_splits(files, pattern)
    return list(found)


def list_local(patterns: Sequence[str]) -> list[Path]:
    """The same for files of any kind that other modules read; no URLs.

    Raises:
        DataError: a name matches nothing, or is a URL.
    """
    found: dict[Path, None] = {}
    for pattern in _named(patterns):
        if is_remote(pattern):
            raise DataError(f"data.prepare: {pattern} is a URL", remedy="copy the files to a file system")
        found |= dict.fromkeys(_local(pattern))
    return list(found)


def _named(patterns: Sequence[str]) -> Sequence[str]:
    if not patterns:
        raise DataError("data.prepare: source is documents, but no document file is named", remedy="set documents")
    return patterns


def _local(pattern: str) -> list[Path]:
    matches = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 absolute patterns
    files = [Path(match).resolve() for match in matches if Path(match).is_file()]
    if not files:
        raise _none(pattern)
    return files


def _none(pattern: str) -> DataError:
    what = "document file"
    return DataError(
        f"data.prepare: {f'there is no {what} {pattern}' if is_remote(pattern) else missing(pattern, what=what)}",
        remedy="correct the path or pattern (data.prepare.documents, --documents or --data); relative ones start in "
        "the folder where the command runs",
    )


def scan_files(
    files: Sequence[File], *, slice_records: int, threads: int = 2, settings: ReadSettings = _DEFAULT
) -> list[FileSlice]:
    """Digest every file once and cut it into slices.

    Args:
        files: as from `list_files`.
        slice_records: records of a slice, at most.
        threads: files read at a time (hashing releases the GIL).
        settings: decide how records are converted.

    Raises:
        DataError: a file cannot be read or is damaged as a whole.
    """
    splits = splits_of(files)
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda file: _scan(file, slice_records, settings, splits.get(file)), files)
        return [part for parts in found for part in parts]


def _scan(file: File, slice_records: int, settings: ReadSettings, split: SplitName | None) -> list[FileSlice]:
    suffix = _suffix(file)
    try:
        version = version_of(file)
        found = FORMATS[suffix].scan(file, slice_records, settings)
    except _UNREADABLE as error:
        raise _unreadable(file, error) from error
    return [FileSlice(suffix, found.digest, replace(run, split=split), version) for run in found.runs]


def _unreadable(file: File, error: Exception) -> DataError:
    return DataError(f"documents: {file} cannot be read: {error}", remedy="mend or remove it")


def _suffix(file: File) -> str:
    """The file's suffix in FORMATS, the longest one; "" if there is none."""
    return max((suffix for suffix in FORMATS if file.name.endswith(suffix)), key=len, default="")
