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

from mmscale.data.dedup.picture_hashes import PictureHash, hash_picture
from mmscale.data.dedup.words import Hashes, hashes_of, words_of
from mmscale.data.modalities.modality import Codec
from mmscale.data.modalities.table import decode_item, open_codecs
from mmscale.data.modalities.text_tokens import TextTokenizer, open_text_tokenizer
from mmscale.data.prepared.manifest import Manifest, Part, parts_of, read_manifest
from mmscale.data.prepared.parts import read_document, read_documents
from mmscale.data.vocab import IMAGE

SLICE = 1 << 15  # documents of a piece of work
_KEPT = 4096  # pictures whose hashes are kept: several documents may show the same one


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
    """The content of a document, as hashes.

    Attributes:
        shape: hash of the kinds of its parts.
        words: hashes of its words [n].
        items: hash of each item's codes.
        hashes: of each item of the modality image; None for other items, and if the tokenizer cannot decode.
    """

    shape: int
    words: Hashes
    items: list[int]
    hashes: list[PictureHash | None]


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
        self._hashes: dict[int, PictureHash | None] = {}  # by the hash of codes

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
        for ids in read_documents(self.folder, self.parts[piece.part], piece.start, piece.stop):
            yield self._content(ids)

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
        borders = np.flatnonzero(modality[1:] != modality[:-1]) + 1
        kinds: list[str] = []
        items: list[int] = []
        hashes: list[PictureHash | None] = []
        for run, own in zip(np.split(ids, borders), modality[[0, *borders]].tolist(), strict=True):
            name = vocabulary.names[own]
            if name == vocabulary.names[0]:
                if (run >= len(vocabulary.specials)).any():
                    kinds.append(name)
                continue
            kinds.append(name)
            codes = run - vocabulary.range_of(name)[0]
            items.append(xxhash.xxh3_64_intdigest(self._salts[name] + codes.astype("<i8").tobytes()) or 1)
            hashes.append(self._hash(items[-1], name, codes))
        words = hashes_of(words_of(self._text(ids)))
        return DocumentContent(xxhash.xxh3_64_intdigest("\0".join(kinds).encode()) or 1, words, items, hashes)

    def _hash(self, item: int, name: str, codes: NDArray[np.int64]) -> PictureHash | None:
        """The hash and thumbnails of an item with a hash of its codes; those of equal codes are kept."""
        if name != IMAGE or not self._draw:
            return None
        if item not in self._hashes:
            if len(self._hashes) >= _KEPT:
                self._hashes.clear()
            pixels = decode_item(name, codes, self._codecs.get(name))
            self._hashes[item] = None if pixels is None else hash_picture(pixels)
        return self._hashes[item]


def folded(hashes: Sequence[int] | Hashes) -> int:
    """A hash of a sequence of hashes; 0 if it is empty."""
    state = xxhash.xxh3_64(np.asarray(hashes, np.uint64).tobytes())
    return (state.intdigest() or 1) if len(hashes) else 0
