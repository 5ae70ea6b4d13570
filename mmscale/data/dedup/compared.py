"""Reads the contents of documents that deduplication compares from a prepared data set; compared_files.py stores them.

Documents have the numbers that the sampler uses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from mmscale.data.dedup.words import Hashes, hashes_of, words_of
from mmscale.data.modalities.modality import Codec
from mmscale.data.modalities.table import decode_item, open_codecs
from mmscale.data.modalities.text_tokens import TextTokenizer, open_text_tokenizer
from mmscale.data.prepared.manifest import Manifest, Part, parts_of, read_manifest
from mmscale.data.prepared.parts import read_document
from mmscale.data.vocab import IMAGE

SLICE = 1 << 15  # documents of a piece of work


@dataclass(frozen=True)
class DocumentRange:
    """Consecutive documents of one part of a data set.

    Attributes:
        part: number of the part in the split.
        start, stop: documents inside the part.
        first: number of the first one in the split.
    """

    part: int
    start: int
    stop: int
    first: int


def slices(parts: Sequence[Part], *, size: int = SLICE) -> list[DocumentRange]:
    """All documents of a split, divided into units of work."""
    found: list[DocumentRange] = []
    first = 0
    for number, part in enumerate(parts):
        starts = range(0, part.documents, size)
        found += [DocumentRange(number, start, min(start + size, part.documents), first + start) for start in starts]
        first += part.documents
    return found


@dataclass(frozen=True, eq=False)
class DocumentContent:
    """The content of a document, as hashes and pictures.

    Attributes:
        shape: hash of the kinds of its parts.
        words: hashes of its words [n].
        items: hash of each item's codes.
        pictures: pixels of each item of the modality image; None for other items, and if the tokenizer cannot decode.
    """

    shape: int
    words: Hashes
    items: list[int]
    pictures: list[NDArray[np.uint8] | None]


class ContentReader:
    """Reads the documents of a split.

    Args:
        folder: a prepared data set.
        split: name of the split.
        draw: whether pictures are decoded.

    Raises:
        DataError: the data set is missing or damaged.
    """

    def __init__(self, folder: Path, *, split: str, draw: bool) -> None:
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        self.parts = parts_of(folder, self.manifest, split)
        self._draw = draw

    @cached_property
    def _tokenizer(self) -> TextTokenizer:
        return open_text_tokenizer(self.folder)

    @cached_property
    def _codecs(self) -> dict[str, Codec]:
        return open_codecs(self.folder) if self._draw else {}

    @cached_property
    def _salts(self) -> dict[str, bytes]:
        """Salts by which hashes of codes depend on the tokenizer: equal codes of different tokenizers are not equal."""
        return {name: self.manifest.tokenizers.get(name, "").encode() for name in self.manifest.modalities}

    def contents(self, piece: DocumentRange) -> Iterator[DocumentContent]:
        """The contents of its documents, one by one."""
        part = self.parts[piece.part]
        for place in range(piece.start, piece.stop):
            yield self._content(read_document(self.folder, part, place))

    def text(self, piece: DocumentRange, place: int) -> str:
        """The text of a document of a slice; `place` counts from the slice's first document."""
        return self._text(read_document(self.folder, self.parts[piece.part], piece.start + place))

    def _text(self, ids: NDArray[np.int64]) -> str:
        start, stop = self.manifest.ranges[0]
        own = ids[(ids >= max(start, len(self.manifest.vocab.specials))) & (ids < stop)]
        return self._tokenizer.decode(own) if len(own) else ""

    def _content(self, ids: NDArray[np.int64]) -> DocumentContent:
        vocabulary = self.manifest.vocab
        modality = vocabulary.modality_of(ids)
        borders = np.flatnonzero(np.diff(modality)) + 1
        kinds: list[str] = []
        items: list[int] = []
        pictures: list[NDArray[np.uint8] | None] = []
        for run in np.split(ids, borders):
            name = vocabulary.names[int(vocabulary.modality_of(run[:1])[0])]
            if name == vocabulary.names[0]:
                if (run >= len(vocabulary.specials)).any():
                    kinds.append(name)
                continue
            kinds.append(name)
            codes = run - vocabulary.range_of(name)[0]
            items.append(xxhash.xxh3_64_intdigest(self._salts[name] + codes.astype("<i8").tobytes()) or 1)
            values = decode_item(name, codes, self._codecs.get(name)) if name == IMAGE and self._draw else None
            pictures.append(values)
        words = hashes_of(words_of(self._text(ids)))
        return DocumentContent(xxhash.xxh3_64_intdigest("\0".join(kinds).encode()) or 1, words, items, pictures)


def folded(hashes: Sequence[int] | Hashes) -> int:
    """A hash of a sequence of hashes; 0 if it is empty."""
    state = xxhash.xxh3_64(np.asarray(hashes, np.uint64).tobytes())
    return (state.intdigest() or 1) if len(hashes) else 0
