"""Tables of neighbours next to a prepared data set: the training documents that are nearest to each of its documents.

`mmscale data retrieve` writes them (mmscale/data/retrieval), and mmscale/data/stream/composites.py reads documents
together with their neighbours. This module stores and reads the tables. No torch.

D documents of a split, k neighbours.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from mmscale.data.arrays import read_array
from mmscale.data.digests import Hasher
from mmscale.data.prepared.folder_lock import held, write_error
from mmscale.data.prepared.made_for import MadeFor, read_made_for
from mmscale.data.prepared.manifest import TRAIN, Count, Inside
from mmscale.errors import DataError, shell_command
from mmscale.runtime.atomic_files import write_atomic

FOLDER = "neighbours"
FILE = f"{FOLDER}/neighbours.json"
NO_NEIGHBOUR = -1
MOST_COLUMNS = 64  # neighbours of a document in a table
_FORMAT = 1
_MOST_BYTES = 1 << 20
_KEY = 12  # characters of a digest in the name of a file


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NeighbourTable(_Entry):
    """The neighbours of the documents of one split.

    Attributes:
        file: int64 [D, k], numbers of training documents, the nearest first, and then -1; relative to the data set's
            folder.
        digest: of the file, as in digests.json.
        documents: D.
    """

    file: Inside
    digest: str
    documents: Count

    @property
    def key(self) -> str:
        """Identifies the table by its content."""
        return self.digest[:_KEY]


class NeighboursFile(MadeFor):
    """The content of neighbours/neighbours.json.

    Attributes:
        of: identity of the training documents.
        columns: k.
        splits: the tables by the split of their documents.
        made: arguments and findings of the command, for people.
    """

    columns: Annotated[int, Field(ge=1, le=MOST_COLUMNS)]
    splits: dict[str, NeighbourTable]
    made: dict[str, Any] = Field(default_factory=dict)


def read_neighbours(folder: Path, *, of: str | None = None) -> NeighboursFile | None:
    """The tables of a data set; None if it has none.

    Args:
        folder: the data set.
        of: identity of its training documents; None: not compared.

    Raises:
        DataError: they are damaged, of another version, or were made for other documents.
    """
    return read_made_for(NeighboursFile, folder / FILE, version=_FORMAT, most=_MOST_BYTES, of=of, remedy=_again(folder))


def table_of(folder: Path, split: str, *, of: str) -> NeighbourTable:
    """The table for the documents of a split.

    Args:
        folder: the data set.
        split: name of the split.
        of: identity of its training documents.

    Raises:
        DataError: there is none, or it is damaged or was made for other documents.
    """
    found = read_neighbours(folder, of=of)
    if found is None or split not in found.splits:
        by_user = split != TRAIN and found is not None and "embeddings" in found.made
        more = " with --held-out-embeddings" if by_user else ""
        raise DataError(
            f"data: {folder} has no neighbours for its documents of the split {split!r}",
            remedy=f"run {shell_command('data', 'retrieve', folder)}{more}, "
            "or read documents without neighbours (data.retrieval.neighbours=0, data.retrieval.evaluation=0)",
        )
    return found.splits[split]


def open_table(folder: Path, split: str, key: str, *, documents: int) -> NDArray[np.int64]:
    """The neighbours of each document of a split, in a mapped file, int64 [D, k].

    Args:
        folder: the data set.
        split: name of the split.
        key: of the table. Tables that were replaced are kept, so that a run that has used one finds its position.
        documents: D.

    Raises:
        DataError: the file is missing or damaged.
    """
    file = folder / FOLDER / f"{split}-{key}.npy"
    try:
        found: NDArray[np.int64] = read_array(file, mapped=True)
    except (OSError, ValueError) as error:
        raise DataError(
            f"data: the neighbours {file} cannot be read: {error}",
            remedy="copy the file again; or start a run of another name",
        ) from error
    if found.dtype != np.int64 or found.ndim != 2 or len(found) != documents or not 1 <= found.shape[1] <= MOST_COLUMNS:
        raise DataError(
            f"data: {file} has {found.dtype} of shape {found.shape}, not neighbours of {documents} documents",
            remedy=_again(folder),
        )
    return found


def check_numbers(found: NDArray[np.int64], *, bank: int, folder: Path) -> None:
    """Refuse entries of a table that are no numbers of training documents.

    Args:
        found: entries of the table.
        bank: number of training documents.
        folder: the data set.

    Raises:
        DataError: there is one.
    """
    if ((found < NO_NEIGHBOUR) | (found >= bank)).any():
        raise DataError(
            f"data: a table in {folder / FOLDER} has numbers outside of the {bank} training documents",
            remedy=_again(folder),
        )


def write_neighbours(
    folder: Path, tables: Mapping[str, NDArray[np.int64]], *, of: str, made: Mapping[str, Any]
) -> NeighboursFile:
    """Write tables, atomically; those that they replace are kept as files.

    Args:
        folder: the data set.
        tables: int64 [D, k] by split.
        of: identity of the training documents.
        made: arguments and findings of the command, plain JSON.

    Raises:
        DataError: the disk is full, or the folder cannot be written.
    """
    splits = {}
    try:
        (folder / FOLDER).mkdir(exist_ok=True)
        with held(folder):
            for split, table in tables.items():
                content = io.BytesIO()
                np.save(content, table)
                hasher = Hasher()
                hasher.update(content.getvalue())
                digest = hasher.hexdigest()
                entry = NeighbourTable(
                    file=f"{FOLDER}/{split}-{digest[:_KEY]}.npy", digest=digest, documents=len(table)
                )
                write_atomic(folder / entry.file, content.getvalue())
                splits[split] = entry
            columns = next(iter(tables.values())).shape[1]
            written = NeighboursFile(format=_FORMAT, of=of, columns=columns, splits=splits, made=dict(made))
            write_atomic(folder / FILE, (written.model_dump_json(indent=1) + "\n").encode())
    except OSError as error:
        raise write_error(error, folder / FOLDER) from error
    return written


def remove_neighbours(folder: Path) -> bool:
    """Forget the tables, whose files are kept for runs that have used them; False: there are none."""
    with held(folder):
        known = (folder / FILE).exists()
        (folder / FILE).unlink(missing_ok=True)
    return known


def digests_of(folder: Path) -> dict[str, str]:
    """Digests of the tables in use by their paths relative to the folder; empty without any.

    Raises:
        DataError: neighbours.json is damaged.
    """
    found = read_neighbours(folder)
    return {} if found is None else {table.file: table.digest for table in found.splits.values()}


def _again(folder: Path) -> str:
    return f"run {shell_command('data', 'retrieve', folder)} again"
