"""Finds pictures, other items and texts of held-out documents that also occur in training documents.

Held-out losses of such documents measure memorization. Complete token sequences are compared: items by their codes,
and texts only of documents without items (captions may repeat). Of large data sets a limited number of training tokens
is read, so the shares are lower bounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmscale.data.arrays import scattered
from mmscale.data.documents.schema import TRAIN, VALIDATION
from mmscale.data.prepared.manifest import Manifest, Part, read_table
from mmscale.data.prepared.parts import dtype_for

TOKENS = 50_000_000  # largest number of tokens read of each split: about 3 s
_WEIGHTS = 1 << 16  # number of random factors for positions in a text; longer texts repeat them

_NOTED = 0.01  # smallest share that is reported

Keys = NDArray[np.uint64]


@dataclass(frozen=True)
class Shared:
    """What two splits have in common.

    Attributes:
        pictures, texts: (number in held-out documents that training documents have too, number in held-out documents),
            of items of modalities with a tokenizer, and of documents of text only.
    """

    pictures: tuple[int, int]
    texts: tuple[int, int]

    def notes(self) -> list[str]:
        """Notes for the user; empty if less than one in a hundred is shared."""
        return [
            f"note: {common} of {total} {what} of held-out documents are in training documents too: held-out numbers "
            'measure memory. Documents with the same "group" (else the same "id") are kept in one split'
            for what, (common, total) in (("items", self.pictures), ("pure texts", self.texts))
            if common >= _NOTED * total > 0
        ]


def comparable(manifest: Manifest) -> bool:
    """Whether mmscale wrote the token files, so that documents follow one another.

    Those of a Megatron corpus need not.
    """
    return all(part.id_offset is None for split in manifest.splits.values() for part in split.parts)


def shared_content(folder: Path, manifest: Manifest, *, tokens: int = TOKENS) -> Shared:
    """Compare the held-out split with the training split.

    Args:
        folder: a prepared data set.
        manifest: of it.
        tokens: largest number of tokens to read of each split.
    """
    if not all(name in manifest.splits for name in (TRAIN, VALIDATION)):
        return Shared((0, 0), (0, 0))
    train, held_out = (_keys_of(folder, manifest, name, tokens) for name in (TRAIN, VALIDATION))
    pictures, texts = ((int(np.isin(own, known).sum()), len(own)) for own, known in zip(held_out, train, strict=True))
    return Shared(pictures, texts)


def _keys_of(folder: Path, manifest: Manifest, split: str, tokens: int) -> tuple[Keys, Keys]:
    """64-bit keys of a split's items, and of its documents of text only."""
    found: tuple[list[Keys], list[Keys]] = ([], [])
    for part in manifest.splits[split].parts:
        if part.id_offset is not None:  # documents of a Megatron corpus need not follow one another
            continue
        if tokens <= 0:
            break
        for own, keys in zip(found, _keys_of_part(folder, manifest, part, tokens), strict=True):
            own.append(keys)
        tokens -= sum(part.tokens.values())
    pictures, texts = (np.concatenate(own) if own else np.zeros(0, np.uint64) for own in found)
    return pictures, texts


def _keys_of_part(folder: Path, manifest: Manifest, part: Part, tokens: int) -> Iterator[Keys]:
    vocabulary = manifest.vocab
    table = read_table(folder, part)[:, :-1].astype(np.int64)
    lengths = table.sum(axis=1)
    lengths = lengths[: int(np.searchsorted(lengths.cumsum(), tokens, side="right"))]
    ids = np.fromfile(folder / f"{part.prefix}.bin", dtype=dtype_for(vocabulary), count=int(lengths.sum()))
    values = scattered(ids.astype(np.uint64))
    weights = np.random.default_rng(0).integers(0, 1 << 63, _WEIGHTS, dtype=np.uint64) | np.uint64(1)
    yield np.concatenate([_items(name, ids, values, weights, manifest) for name in vocabulary.names])
    starts = lengths.cumsum() - lengths
    position = np.arange(len(ids)) - np.repeat(starts, lengths)
    only_text = table[: len(lengths), 1:].sum(axis=1) == 0
    sums = np.add.reduceat(values * weights[position % _WEIGHTS], starts) if len(starts) else np.zeros(0, np.uint64)
    yield sums[only_text]


def _items(name: str, ids: NDArray[np.integer], values: Keys, weights: Keys, manifest: Manifest) -> Keys:
    """Keys of a modality's items; empty if they have no begin token or no common length."""
    marks, length = manifest.vocab.marks(name), manifest.tokens_per_item.get(name, 0)
    if marks is None or not length:
        return np.zeros(0, np.uint64)
    first = np.flatnonzero(ids == marks[0]) + 1
    keys = np.zeros(len(first), np.uint64)
    for offset in range(length):
        keys += values[first + offset] * weights[offset % _WEIGHTS]
    return keys
