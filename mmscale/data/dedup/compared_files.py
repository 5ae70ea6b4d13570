"""Facts, signatures and thumbnails of all documents that deduplication compares, in mapped files.

The documents are divided into blocks, each with a folder of its own, so that tasks on several machines never write to
the same file. Only the pages in use are in memory. D documents of the training split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.data.arrays import scattered
from mmscale.data.dedup.compared import DocumentContent, folded
from mmscale.data.dedup.picture_hashes import COLOUR, GREY, PictureHash, PictureHashes
from mmscale.data.dedup.signers import Signer
from mmscale.data.dedup.words import MINIMA, SHINGLE, shingles

FACTS = np.dtype(
    [
        ("shape", "<u8"),  # kinds of its parts in their order, never 0
        ("text", "<u8"),  # its words; 0: it has none
        ("items", "<u8"),  # codes of all its items; 0: it has none
        ("rest", "<u8"),  # codes of its items behind the first
        ("bits", "<u8"),  # structure of its first picture
        ("looks", "?"),  # whether it has a picture that was decoded
    ]
)
_COLUMNS: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
    "facts": (FACTS, ()),
    "signatures": (np.dtype("<u4"), (MINIMA,)),
    "grey": (np.dtype("u1"), (GREY * GREY,)),
    "colour": (np.dtype("u1"), (COLOUR * COLOUR * 3,)),
}


@dataclass(frozen=True)
class RecordBlock:
    """Consecutive documents whose records are in one folder.

    Attributes:
        folder: of the files.
        first, stop: numbers of the documents.
    """

    folder: Path
    first: int
    stop: int

    def create(self) -> None:
        """Create the files, unless they exist; sparse ones, whose blocks are allocated when they are written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, (dtype, shape) in _COLUMNS.items():
            with (self.folder / name).open("ab") as file:
                file.truncate(dtype.itemsize * int(np.prod((self.stop - self.first, *shape))))


class _Column:
    """One array over all blocks."""

    def __init__(self, blocks: Sequence[RecordBlock], name: str) -> None:
        dtype, shape = _COLUMNS[name]
        self._dtype, self._shape = dtype, shape
        self._starts = np.array([block.first for block in blocks])
        self._maps = [
            np.memmap(block.folder / name, dtype=dtype, mode="r+", shape=(block.stop - block.first, *shape))
            for block in blocks
        ]

    def _block(self, document: int) -> int:
        return int(np.searchsorted(self._starts, document, side="right")) - 1

    def of(self, documents: NDArray[np.int64]) -> NDArray[Any]:
        """Rows of some documents, a copy."""
        if len(self._maps) == 1:
            return np.asarray(self._maps[0][documents - self._starts[0]])
        found = np.empty((len(documents), *self._shape), self._dtype)
        blocks = np.searchsorted(self._starts, documents, side="right") - 1
        for block in np.unique(blocks).tolist():
            own = blocks == block
            found[own] = self._maps[block][documents[own] - self._starts[block]]
        return found

    def between(self, first: int, stop: int) -> NDArray[Any]:
        """Rows of consecutive documents of one block, a view."""
        block = self._block(first)
        start = int(self._starts[block])
        return self._maps[block][first - start : stop - start]

    def write(self, document: int, row: Any) -> None:
        block = self._block(document)
        self._maps[block][document - int(self._starts[block])] = row

    def flush(self, document: int) -> None:
        self._maps[self._block(document)].flush()


class Compared:
    """The records of all documents.

    Args:
        blocks: in the order of their documents, without gaps. Their files must exist.

    Attributes:
        facts, signatures: rows of `FACTS`, and MinHash signatures.
    """

    def __init__(self, blocks: Sequence[RecordBlock]) -> None:
        self.facts, self.signatures, self._grey, self._colour = (_Column(blocks, name) for name in _COLUMNS)

    def hashes(self, documents: NDArray[np.int64]) -> PictureHashes:
        """Hashes and thumbnails of the first picture of each of these documents, in their order [n]."""
        return PictureHashes(self.facts.of(documents)["bits"], self._grey.of(documents), self._colour.of(documents))

    def add(self, number: int, content: DocumentContent, *, sign: Signer | None) -> list[PictureHash]:
        """Write the data of a document.

        Args:
            number: of the document.
            content: of it.
            sign: computes signatures of texts; None: none are needed.

        Returns:
            Hashes and thumbnails of all its pictures.
        """
        drawn = [one for one in content.hashes if one is not None]
        first = bool(content.hashes) and content.hashes[0] is not None
        row = (
            content.shape,
            folded(content.words),
            folded(content.items),
            int(scattered(np.array([folded(content.items[1:])], np.uint64))[0]),
            drawn[0][0] if first else 0,
            first,
        )
        self.facts.write(number, row)
        if sign is not None and len(content.words):
            self.signatures.write(number, sign(np.unique(shingles(content.words, SHINGLE))))
        if first:
            self._grey.write(number, drawn[0][1])
            self._colour.write(number, drawn[0][2])
        return drawn

    def flush(self, document: int) -> None:
        """Write the records of a document's block to disk, so that other machines read them."""
        for column in (self.facts, self.signatures, self._grey, self._colour):
            column.flush(document)
