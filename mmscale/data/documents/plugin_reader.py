"""Reads document files of other formats through a plug-in (`data.prepare.reader`).

readers.py reads the built-in formats. The plug-in returns records; schema.py checks them like those of any other file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmscale.data.documents.schema import Document, Rejected, folder_resolver, parse_document
from mmscale.data.documents.slices import ItemStates
from mmscale.errors import DataError, MmscaleError
from mmscale.tables import plugins
from mmscale.tables.plugins import Use


@dataclass(frozen=True)
class PluginSlice:
    """Records first..first+count-1 of one file, read by a plug-in. A worker process imports the plug-in again.

    Attributes:
        path: the file.
        use: names the plug-in, and its arguments.
        digest: SHA-256 of the file.
        ignore: keys of a record that are not read.
        items: state of the files that the records name; "": they name none.
    """

    path: Path
    use: Use
    digest: str
    first: int
    count: int
    ignore: tuple[str, ...] = ()
    items: str = ""

    @property
    def identity(self) -> str:
        """File content and the range of records; the plug-in's name is in the settings of the data set."""
        return f"{self.path.name}:{self.digest}:{self.first}+{self.count}"

    def read(self) -> Iterator[Document | Rejected]:
        """The slice's documents and rejections.

        Raises:
            PluginError: the plug-in cannot be loaded.
            DataError: it fails, or returns another number of records than it counted.
        """
        resolve, made = folder_resolver(self.path.parent), plugins.make(self.use)
        number = self.first
        for record in _guarded(self.use, self.path, lambda: made.read(self.path, self.first, self.count)):
            number += 1
            where = f"{self.path.name}:{number}"
            yield parse_document(record, where=where, fallback_id=where, resolve=resolve, ignore=self.ignore)
        if number != self.first + self.count:
            raise DataError(
                f"documents: {self.use.name} gives {number - self.first} records of {self.path} from {self.first} on, "
                f"instead of {self.count}",
                remedy="`count` and `read` of a reader must agree, see docs/extending/reader.md",
            )


def scan_with(
    use: Use, files: Sequence[Path], *, slice_records: int, ignore: tuple[str, ...] = ()
) -> list[PluginSlice]:
    """Digest every file once, have the plug-in count its records, and cut it into slices.

    Args:
        use: names the plug-in.
        files: as from `list_files`.
        slice_records: records of a slice, at most.
        ignore: keys of a record that are not read.

    Raises:
        PluginError: the plug-in cannot be loaded.
        DataError: a file cannot be read.
    """
    plugins.check(use)
    reader, found = plugins.make(use), []
    for file in files:
        try:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"documents: {file} cannot be read: {error}", remedy="mend or remove it") from error
        (total,) = _guarded(use, file, lambda file=file: [reader.count(file)])  # type: ignore[misc]
        if type(total) is not int or total < 0:
            raise DataError(
                f"documents: {use.name} counts {total!r} records in {file}",
                remedy="`count` of a reader returns a whole number, see docs/extending/reader.md",
            )
        starts = range(0, total, slice_records)
        for at in starts:
            count = min(slice_records, total - at)
            found.append(PluginSlice(file, use, digest, at, count, ignore, _item_states(use, reader, file, at, count)))
    return found


def _item_states(use: Use, reader: Any, file: Path, first: int, count: int) -> str:
    """State of the files that records name. Other problems of the records are reported when they are read."""
    states = ItemStates(file)
    for record in _guarded(use, file, lambda: reader.read(file, first, count)):
        content = record.get("content") if isinstance(record, Mapping) else None
        items = content if isinstance(content, list) else []
        states.add([item.get("path") for item in items if isinstance(item, Mapping)])
    return states.take()


def _guarded(use: Use, file: Path, call: Callable[[], Any]) -> Iterator[Any]:
    """The results of a call, one by one. Any error of the plug-in becomes one line that names it and the file."""
    try:
        yield from call()
    except MmscaleError:
        raise
    except Exception as error:  # a plug-in may raise anything for a damaged file
        raise DataError(
            f"documents: {use.name} cannot read {file}: {type(error).__name__}: {error}",
            remedy="mend or remove the file, or correct the reader",
        ) from error
