"""Finds training documents that contain parts of held-out documents (decontamination).

A training document is contaminated if it has an item with the codes of a held-out one, a picture that looks like a
held-out one, or a run of 13 words of a held-out document of text only (Brown et al. 2020, appendix C). Captions are not
compared, because they repeat. Runs of words in more than ten training documents are common phrases, and are ignored.
Memory: 8 bytes a word of held-out texts, 700 bytes a held-out picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmscale.data.dedup.compared import ContentReader, DocumentContent, folded, slices
from mmscale.data.dedup.picture_hashes import PictureHashes, joined, near, table_keys
from mmscale.data.dedup.words import Hashes, shingles

GRAM = 13  # words
PHRASE = 10  # a run of words in more training documents than this is a common phrase
_PAIRS = 1 << 20  # pairs of pictures with the same key whose hashes are compared at once: 32 MB
_NEAR = 1 << 14  # and pairs whose thumbnails are: 32 MB


@dataclass(frozen=True, eq=False)
class Overlap:
    """Which parts of held-out documents a training document contains.

    Attributes:
        item: an item, by its codes.
        text: a complete held-out text of fewer than 13 words.
        grams: numbers of runs of 13 words.
    """

    item: bool
    text: bool
    grams: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class HeldOutContent:
    """The contents of held-out documents, sorted.

    Attributes:
        grams: runs of 13 words of documents of text only.
        texts: complete texts with fewer words, of documents of text only.
        items: codes of items.
        hashes: of pictures.
        keys: keys of the pictures, sorted, with the number of the picture.
        distance: bits in which hashes of pictures may differ; -1: pictures are not compared.
    """

    grams: Hashes
    texts: Hashes
    items: Hashes
    hashes: PictureHashes
    keys: tuple[Hashes, NDArray[np.int64]]
    distance: int

    def find(self, content: DocumentContent) -> Overlap:
        """Which of these contents a training document has, apart from pictures that look alike (`looks_like`)."""
        item = bool(_among(np.array(content.items, np.uint64), self.items).any())
        text = not content.items and bool(_among(np.array([folded(content.words)], np.uint64), self.texts).any())
        grams = np.zeros(0, np.int64)
        if len(self.grams) and len(content.words) >= GRAM:
            own = np.unique(shingles(content.words, GRAM))
            grams = np.searchsorted(self.grams, own[_among(own, self.grams)])
        return Overlap(item, text and bool(len(content.words)), grams)

    def looks_like(self, hashes: PictureHashes) -> NDArray[np.bool_]:
        """Which of n pictures look like one of these, bool [n]."""
        found = np.zeros(len(hashes.bits), bool)
        if self.distance < 0 or not len(self.hashes.bits):
            return found
        keys, owners = self.keys
        own = table_keys(hashes.bits, distance=self.distance)
        starts, stops = (np.searchsorted(keys, own, side=side) for side in ("left", "right"))
        for start, stop in zip(starts.T, stops.T, strict=True):  # one table of keys at a time
            for some in _blocks(np.where(found, 0, stop - start)):
                number = (stop - start)[some]
                picture = np.repeat(some, number)
                first = np.repeat(start[some] - np.cumsum(number) + number, number)
                other = owners[first + np.arange(len(picture))]
                # Hashes are compared first: few pictures with a common key pass, and thumbnails are 40 times as large.
                close = np.bitwise_count(self.hashes.bits[other] ^ hashes.bits[picture]) <= self.distance
                pairs = np.stack([picture, other], axis=1)[close]
                for at in range(0, len(pairs), _NEAR):
                    one, held = pairs[at : at + _NEAR].T
                    alike = near(hashes.take(one), self.hashes.take(held), distance=self.distance)
                    found[one[alike]] = True
        return found


def _blocks(counts: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Numbers of the pictures with candidates, in blocks of about _PAIRS candidates."""
    chosen = np.flatnonzero(counts)
    if not len(chosen):
        return []
    block = np.cumsum(counts[chosen]) // _PAIRS
    return np.split(chosen, np.flatnonzero(block[1:] != block[:-1]) + 1)


def _among(wanted: Hashes, known: Hashes) -> NDArray[np.bool_]:
    """Which numbers occur in a sorted array."""
    if not len(known):
        return np.zeros(len(wanted), bool)
    places = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.asarray(known[places] == wanted)


def read_held_out(sets: Sequence[tuple[Path, str]], *, distance: int) -> HeldOutContent:
    """The contents of the documents of some splits.

    Args:
        sets: folders and splits.
        distance: bits in which hashes of pictures may differ; -1: pictures are not decoded.

    Raises:
        DataError: a data set is missing or damaged.
    """
    grams, texts, items, drawn = [], [], [], []
    for folder, split in sets:
        reader = ContentReader(folder, split=split, draw=distance >= 0)
        for piece in slices(reader.parts):
            for content in reader.contents(piece):
                items += content.items
                drawn += [one for one in content.hashes if one is not None]
                if content.items or not len(content.words):
                    continue
                if len(content.words) < GRAM:
                    texts.append(folded(content.words))
                else:
                    grams.append(np.unique(shingles(content.words, GRAM)))
    drawn = list({(one[0], one[1].tobytes(), one[2].tobytes()): one for one in drawn}.values())  # each picture once
    hashes = joined(drawn)
    keys, owners = np.zeros(0, np.uint64), np.zeros(0, np.int64)
    if distance >= 0 and len(drawn):
        table = table_keys(hashes.bits, distance=distance)
        order = np.argsort(table.ravel(), kind="stable")
        keys, owners = table.ravel()[order], order // table.shape[1]
    return HeldOutContent(
        grams=np.unique(np.concatenate(grams)) if grams else np.zeros(0, np.uint64),
        texts=np.unique(np.array(texts, np.uint64)),
        items=np.unique(np.array(items, np.uint64)),
        hashes=hashes,
        keys=(keys, owners),
        distance=distance,
    )
