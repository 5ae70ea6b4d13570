"""What readers of document files are given and what they give: a run of records, and how a file is cut into runs.

readers.py has the table of formats; each format is a file beside it.
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
    """Settings of `data.prepare` that decide what records become.

    Attributes:
        ignore: keys of a record that are not read.
        captions: suffixes of captions in WebDataset archives, lower case, without the dot.
        columns: of tables, those that make up a document, in their order; (): they are named as keys of a document.
        half_pairs: what becomes of a sample of such an archive without its caption or its item.
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
        offset: byte at which the first record starts, where the format has one.
        settings: what decides what records become.
        facts: what the format found out about the file or the run when it was cut.
        items: state of the files that the records name (sizes and times), hashed; "": they name none.
        split: of records that name none, by the name of the file; None: it says none.
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
    """Runs of equal length over a file of `total` records."""
    starts = range(0, total, slice_records)
    return [RecordRun(file, first, min(slice_records, total - first), settings=settings) for first in starts]


def digest_of(file: File) -> str:
    """SHA-256 of a file; of what a store says about one, where that changes with the content."""
    if isinstance(file, RemoteFile) and file.version:
        return hashlib.sha256(f"{file.size}:{file.version}".encode()).hexdigest()
    stream: Any
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass
class ItemStates:
    """Collects the sizes and times of files that records name, so that a changed picture is noticed.

    Attributes:
        file: beside which they are.
    """

    file: File
    _states: list[str] = field(default_factory=list)

    def add(self, names: Sequence[Any]) -> None:
        """Files named by a record, whatever the names are."""
        for name in names:
            if isinstance(name, str):
                self._states.append(f"{name!r} {state_of(self.file, name)}")

    def take(self) -> str:
        """Hash of what was added since the last call; "" if nothing was."""
        states, self._states = self._states, []
        return hashlib.sha256("\n".join(states).encode()).hexdigest() if states else ""
