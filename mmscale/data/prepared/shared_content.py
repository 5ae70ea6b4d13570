"""Finds pictures, other items and texts of held-out documents that also occur in training documents, and repetitions.

Held-out losses of such documents measure memorization; documents that training repeats weigh more. Complete token
sequences are compared: items by their codes, and texts only of documents without items (captions may repeat). Of large
data sets a limited number of training tokens is read, so the shares are lower bounds.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmscale.data.arrays import scattered
from mmscale.data.documents.schema import TRAIN, VALIDATION
from mmscale.data.prepared.manifest import Manifest, Part, read_table
from mmscale.data.prepared.parts import dtype_for

TOKENS = 50_000_000  # largest number of tokens read of each split: about 3 s
_WEIGHTS = 1 << 16  # number of random factors for positions in a text; longer texts repeat them

_GROUP = (
    'Give such documents the same "group" and prepare again: documents with the same "group" (else the same "id") are '
    "kept in one split"
)
_DEDUP = "`mmscale data dedup DIR` leaves such documents out of training"
_IDS = 'every document should have its own, and "group" keeps documents in one split'

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

    def lines(self, *, of: str = "", here: str = "") -> list[str]:
        """One line for each kind of content that is shared, with a remedy; empty if nothing is.

        Args:
            of: the data set that holds out.
            here: the data set that trains, if it is another one.
        """
        owner, place = (f" of {of}" if of else ""), (f" of {here}" if here else "")
        same = ", in two sets if both have one data.prepare.held_out" if here else ""
        return [
            f"{common:,} of {total:,} {what} ({common / total:.1%}) of held-out documents{owner} are in training "
            f"documents{place} too: held-out numbers measure memory. {_GROUP}{same}"
            for what, (common, total) in (("items", self.pictures), ("pure texts", self.texts))
            if common
        ]

    def notes(self, *, of: str = "", here: str = "") -> list[str]:
        """`lines` as notes for the user."""
        return [f"note: {line}" for line in self.lines(of=of, here=here)]


def comparable(manifest: Manifest) -> bool:
    """Whether mmscale wrote the token files, so that documents follow one another.

    Those of a Megatron corpus need not.
    """
    return all(part.id_offset is None for split in manifest.splits.values() for part in split.parts)


@dataclass(frozen=True)
class Repeated:
    """What occurs more than once within the training split.

    Attributes:
        documents, pictures, texts: (number that equal an earlier one, number), of whole documents, of items of
            modalities with a tokenizer, and of documents of text only.
        ids: (number of documents with the id of an earlier one, number of documents) of all splits; None: unknown.
    """

    documents: tuple[int, int]
    pictures: tuple[int, int]
    texts: tuple[int, int]
    ids: tuple[int, int] | None = None

    def notes(self) -> list[str]:
        """Notes for the user on repeated documents and ids; pictures may repeat in documents of other words."""
        return [
            f"note: {common:,} of {total:,} {what} ({common / total:.1%}) {advice}"
            for (common, total), what, advice in (
                (self.documents, "training documents", f"equal an earlier one, items included: {_DEDUP}"),
                (self.ids or (0, 0), "documents", f"have the id of an earlier one: {_IDS}"),
            )
            if common
        ]


def shared_content(folder: Path, manifest: Manifest, *, tokens: int = TOKENS) -> Shared:
    """Compare the held-out split with the training split.

    Args:
        folder: a prepared data set.
        manifest: of it.
        tokens: largest number of tokens to read of each split.
    """
    return content_of_splits(folder, manifest, tokens=tokens)[0]


def content_of_splits(folder: Path, manifest: Manifest, *, tokens: int = TOKENS) -> tuple[Shared, Repeated]:
    """What both splits have in common, and what the training split repeats; arguments as in `shared_content`."""
    found = {name: _keys_of(folder, manifest, name, tokens) for name in (TRAIN, VALIDATION) if name in manifest.splits}
    nothing = SplitKeys.empty()
    train, held_out = found.get(TRAIN, nothing), found.get(VALIDATION, nothing)
    shared = Shared(_common(held_out.items, train.items), _common(held_out.texts, train.texts))
    return shared, Repeated(*(_again(keys) for keys in (train.documents, train.items, train.texts)))


def shared_with(folder: Path, manifest: Manifest, other: Path, held_out: Manifest, *, tokens: int = TOKENS) -> Shared:
    """Compare the training split of a data set with the held-out split of another one with the same tokenizers.

    Args:
        folder: the data set.
        manifest: of it.
        other: the other one.
        held_out: its manifest.
        tokens: as in `shared_content`.
    """
    if TRAIN not in manifest.splits or VALIDATION not in held_out.splits:
        return Shared((0, 0), (0, 0))
    train, own = _keys_of(folder, manifest, TRAIN, tokens), _keys_of(other, held_out, VALIDATION, tokens)
    return Shared(_common(own.items, train.items), _common(own.texts, train.texts))


def in_training(folder: Path, manifest: Manifest, *, tokens: int = TOKENS) -> frozenset[int]:
    """Numbers of the held-out documents of which an item, or the text without items, is in training documents too."""
    if not all(name in manifest.splits for name in (TRAIN, VALIDATION)):
        return frozenset()
    train, held_out = (_keys_of(folder, manifest, name, tokens) for name in (TRAIN, VALIDATION))
    items = held_out.owners[np.isin(held_out.items, train.items)]
    texts = held_out.text_owners[np.isin(held_out.texts, train.texts)]
    return frozenset(items.tolist()) | frozenset(texts.tolist())


def document_keys(folder: Path, manifest: Manifest, split: str, *, tokens: int = TOKENS) -> Keys:
    """A key for each document of a split, equal for equal ids; of a large split only of its first documents.

    Args:
        folder: the data set, which must be `comparable`.
        manifest: of it.
        split: which of its splits.
        tokens: as in `shared_content`.
    """
    return _keys_of(folder, manifest, split, tokens).documents


def document_key(ids: NDArray[np.integer]) -> np.uint64:
    """The same key for the ids of one document."""
    key: np.uint64 = _sums(scattered(ids.astype(np.uint64)), np.zeros(1, np.int64), _position_weights())[0]
    return key


@dataclass(frozen=True)
class SplitKeys:
    """64-bit keys of the content of a split.

    Attributes:
        items: of its items.
        texts: of its documents of text only.
        documents: of all its documents.
        owners: number of the document of each item.
        text_owners: number of each document of text only.
    """

    items: Keys
    texts: Keys
    documents: Keys
    owners: NDArray[np.int64]
    text_owners: NDArray[np.int64]

    @classmethod
    def empty(cls) -> SplitKeys:
        """Keys of a split without documents."""
        keys, numbers = np.zeros(0, np.uint64), np.zeros(0, np.int64)
        return cls(keys, keys, keys, numbers, numbers)


def _common(own: Keys, known: Keys) -> tuple[int, int]:
    return int(np.isin(own, known).sum()), len(own)


def _again(keys: Keys) -> tuple[int, int]:
    return len(keys) - len(np.unique(keys)), len(keys)


def _keys_of(folder: Path, manifest: Manifest, split: str, tokens: int) -> SplitKeys:
    found = [SplitKeys.empty()]
    documents = 0
    for part in manifest.splits[split].parts:
        if part.id_offset is not None:  # documents of a Megatron corpus need not follow one another
            continue
        if tokens <= 0:
            break
        found.append(_keys_of_part(folder, manifest, part, tokens, first=documents))
        tokens -= sum(part.tokens.values())
        documents += part.documents
    return SplitKeys(*(np.concatenate([getattr(one, field.name) for one in found]) for field in fields(SplitKeys)))


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
    items = [_items(name, ids, values, weights, manifest) for name in vocabulary.names]
    owners = np.searchsorted(starts, np.concatenate([places for _, places in items]), side="right") - 1
    sums = _sums(values, starts, weights)
    only_text = np.flatnonzero(table[: len(lengths), 1:].sum(axis=1) == 0)
    keys = np.concatenate([keys for keys, _ in items])
    return SplitKeys(keys, sums[only_text], sums, first + owners, first + only_text)


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
