"""Inputs and outputs of readers of document files: a run of records, and how a file is cut into runs.

readers.py has the table of formats; each format has its own file in this folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmscale.data.documents.document_files import File, RemoteFile, state_of
from mmscale.data.documents.schema import Document, Rejected, SplitName


@dataclass(frozen=True)
class ReadSettings:
    """Settings of `data.prepare` that decide how records are converted.

    Attributes:
        ignore: keys of a record that are not read.
        captions: suffixes of captions in WebDataset archives, lower case, without the dot.
        columns: columns of tables that are combined to a document, in order; (): columns are keys of a document.
        half_pairs: what to do with samples of such an archive that lack the caption or the item.
    """

    ignore: tuple[str, ...] = ()
    captions: tuple[str, ...] = ("txt", "text", "caption", "caption.txt")
    half_pairs: str = "reject"
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class RecordRun:
    """Records first..first+count-1 of one file.

    Attributes:
        path: the file.
        first, count: the records.
        offset: byte at which the first record starts, if the format uses it.
        settings: decide how records are converted.
        facts: data that the format's `scan` passes to its `read`.
        items: state of the files that the records name (sizes and times), hashed; "": they name none.
        split: of records that name none, from the name of the file; None: it names none.
    """

    path: File
    first: int
    count: int
    offset: int = 0
    settings: ReadSettings = ReadSettings()
    facts: Any = None
    items: str = ""
    split: SplitName | None = None


@dataclass
class Scan:
    """A file cut into runs.

    Attributes:
        digest: SHA-256 of the file.
        runs: all of its records, in order.
    """

    digest: str
    runs: list[RecordRun]


@dataclass(frozen=True)
class Format:
    """A format of document files.

    Attributes:
        scan: cuts a file into runs of at most so many records. Raises OSError, ValueError or DataError if the file is
            damaged as a whole.
        read: the documents and rejections of a run.
    """

    scan: Callable[[File, int, ReadSettings], Scan]
    read: Callable[[RecordRun], Iterator[Document | Rejected]]


def cut(file: File, total: int, slice_records: int, settings: ReadSettings) -> list[RecordRun]:
    """Runs of consecutive records over a file; the last one may be shorter.

    Args:
        file: of documents.
        total: its number of records.
        slice_records: records of a run.
        settings: of the readers.
    """
    starts = range(0, total, slice_records)
    return [RecordRun(file, first, min(slice_records, total - first), settings=settings) for first in starts]


def digest_of(file: File) -> str:
    """SHA-256 of a file; for a remote file with a version, of that version."""
    if isinstance(file, RemoteFile) and file.version:
        return hashlib.sha256(f"{file.size}:{file.version}".encode()).hexdigest()
    stream: Any
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass
class ItemStates:
    """Collects the sizes and times of files that records name, so that a changed picture is noticed.

    Attributes:
        file: the document file; names are relative to its folder.
    """

    file: File
    _states: list[str] = field(default_factory=list)

    def add(self, names: Sequence[Any]) -> None:
        """Add the files that a record names; invalid names are allowed."""
        for name in names:
            if isinstance(name, str):
                self._states.append(f"{name!r} {state_of(self.file, name)}")

    def take(self) -> str:
        """Hash of everything added since the last call; "" if nothing was."""
        states, self._states = self._states, []
        return hashlib.sha256("\n".join(states).encode()).hexdigest() if states else ""
