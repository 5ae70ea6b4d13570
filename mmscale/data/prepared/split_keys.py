"""64-bit keys of the items, texts and documents of a split: equal tokens have equal keys.

shared_content.py compares them, and content_facts.py keeps those of items and texts beside the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmscale.data.arrays import scattered
from mmscale.data.prepared.manifest import Manifest, Part, read_table
from mmscale.data.prepared.parts import dtype_for

TOKENS = 50_000_000  # largest number of tokens read of each split: about 3 s
_WEIGHTS = 1 << 16  # number of random factors for positions in a text; longer texts repeat them

Keys = NDArray[np.uint64]
Numbers = NDArray[np.int64]


def _no_keys() -> Keys:
    return np.zeros(0, np.uint64)


def _no_numbers() -> Numbers:
    return np.zeros(0, np.int64)


@dataclass(frozen=True)
class ContentKeys:
    """Keys of the content of a split.

    Attributes:
        items: of its items, by modality.
        texts: of its documents of text only.
    """

    items: Mapping[str, Keys] = field(default_factory=dict)
    texts: Keys = field(default_factory=_no_keys)


@dataclass(frozen=True)
class SplitKeys(ContentKeys):
    """Keys of the content of a split, and the documents that have it.

    Attributes:
        documents: keys of all its documents.
        owners: number of the document of each item, by modality.
        text_owners: number of each document of text only.
    """

    documents: Keys = field(default_factory=_no_keys)
    owners: Mapping[str, Numbers] = field(default_factory=dict)
    text_owners: Numbers = field(default_factory=_no_numbers)


def comparable(manifest: Manifest) -> bool:
    """Whether mmscale wrote the token files, so that documents follow one another.

    Those of a Megatron corpus need not.
    """
    return all(part.id_offset is None for split in manifest.splits.values() for part in split.parts)


def keys_of(folder: Path, manifest: Manifest, split: str, *, tokens: int = TOKENS) -> SplitKeys:
    """Keys of a split; of a large one only of its first documents.

    Args:
        folder: a prepared data set.
        manifest: of it.
        split: which of its splits; it may be missing.
        tokens: largest number of tokens to read.
    """
    found: list[SplitKeys] = []
    documents = 0
    for part in manifest.splits[split].parts if split in manifest.splits else ():
        if part.id_offset is not None:  # documents of a Megatron corpus need not follow one another
            continue
        if tokens <= 0:
            break
        found.append(_keys_of_part(folder, manifest, part, tokens, first=documents))
        tokens -= sum(part.tokens.values())
        documents += part.documents
    if not found:
        return SplitKeys()
    names = found[0].items
    return SplitKeys(
        {name: _joined([one.items[name] for one in found]) for name in names},
        _joined([one.texts for one in found]),
        _joined([one.documents for one in found]),
        {name: np.concatenate([one.owners[name] for one in found]) for name in names},
        np.concatenate([one.text_owners for one in found]),
    )


def document_keys(folder: Path, manifest: Manifest, split: str, *, tokens: int = TOKENS) -> Keys:
    """A key for each document of a split, equal for equal ids; of a large split only of its first documents.

    Args:
        folder: the data set, which must be `comparable`.
        manifest: of it.
        split: which of its splits.
        tokens: as in `keys_of`.
    """
    return keys_of(folder, manifest, split, tokens=tokens).documents


def document_key(ids: NDArray[np.integer]) -> np.uint64:
    """The key of one document as `document_keys` computes it, from its token ids [tokens]."""
    key: np.uint64 = _sums(scattered(ids.astype(np.uint64)), np.zeros(1, np.int64), _position_weights())[0]
    return key


def _joined(keys: Sequence[Keys]) -> Keys:
    return np.concatenate(keys)


def _keys_of_part(folder: Path, manifest: Manifest, part: Part, tokens: int, *, first: int) -> SplitKeys:
    """Keys of a part; `first` is the number of its first document in the split."""
    vocabulary = manifest.vocab
    table = read_table(folder, part)[:, :-1].astype(np.int64)
    lengths = table.sum(axis=1)
    lengths = lengths[: int(np.searchsorted(lengths.cumsum(), tokens, side="right"))]
    ids = np.fromfile(folder / f"{part.prefix}.bin", dtype=dtype_for(vocabulary), count=int(lengths.sum()))
    values = scattered(ids.astype(np.uint64))
    weights = _position_weights()
    starts = lengths.cumsum() - lengths
    items = {name: _items(name, ids, values, weights, manifest) for name in vocabulary.names}
    sums = _sums(values, starts, weights)
    only_text = np.flatnonzero(table[: len(lengths), 1:].sum(axis=1) == 0)
    owners = {name: first + np.searchsorted(starts, at, side="right") - 1 for name, (_, at) in items.items()}
    of_items = {name: own for name, (own, _) in items.items()}
    return SplitKeys(of_items, sums[only_text], sums, owners, first + only_text)


def _position_weights() -> Keys:
    return np.random.default_rng(0).integers(0, 1 << 63, _WEIGHTS, dtype=np.uint64) | np.uint64(1)


def _sums(values: Keys, starts: NDArray[np.int64], weights: Keys) -> Keys:
    """Keys of documents, which begin at `starts` in the scattered ids."""
    if not len(starts):
        return np.zeros(0, np.uint64)
    position = np.arange(len(values)) - np.repeat(starts, np.diff(starts, append=len(values)))
    sums: Keys = np.add.reduceat(values * weights[position % _WEIGHTS], starts)
    return sums


def _items(
    name: str, ids: NDArray[np.integer], values: Keys, weights: Keys, manifest: Manifest
) -> tuple[Keys, NDArray[np.int64]]:
    """Keys of a modality's items, and their places; empty if they have no begin token or no common length."""
    marks, length = manifest.vocab.marks(name), manifest.tokens_per_item.get(name, 0)
    if marks is None or not length:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    first = np.flatnonzero(ids == marks[0]) + 1
    keys = np.zeros(len(first), np.uint64)
    for offset in range(length):
        keys += values[first + offset] * weights[offset % _WEIGHTS]
    return keys, first
