"""Finds items and texts of held-out documents that also occur in training documents, and repetitions.

Held-out losses of such documents measure memorization; documents that training repeats weigh more. Complete token
sequences are compared: items by their codes, and texts only of documents without items (captions may repeat). Of large
data sets a limited number of training tokens is read, so the shares are lower bounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mmscale.data.documents.schema import TRAIN, VALIDATION
from mmscale.data.modalities.table import plural
from mmscale.data.prepared.manifest import Manifest
from mmscale.data.prepared.split_keys import TOKENS, ContentKeys, Keys, SplitKeys, keys_of
from mmscale.data.vocab import IMAGE

PAGE = "docs/reference/documents.md#content-in-both-splits"  # says when a group does not help
_ONE_SET = f'Give documents of the same content one "group" and prepare again ({PAGE})'
_TWO_SETS = (
    f'Give documents of the same content one "group" and prepare both sets with one data.prepare.held_out ({PAGE})'
)
_DEDUP = "`mmscale data dedup DIR` leaves such documents out of training"
_IDS = 'every document should have its own, and "group" keeps documents in one split'

Pair = tuple[int, int]


@dataclass(frozen=True)
class Shared:
    """What two splits have in common.

    Attributes:
        items: (number in held-out documents that training documents have too, number in held-out documents), by
            modality, of those with a tokenizer.
        texts: the same of documents of text only.
    """

    items: Mapping[str, Pair] = field(default_factory=dict)
    texts: Pair = (0, 0)

    @property
    def pictures(self) -> Pair:
        """Of images."""
        return self.items.get(IMAGE, (0, 0))

    def named(self) -> dict[str, Pair]:
        """All pairs by the names that commands print as JSON: `pictures`, other modalities, `texts`."""
        return _named(self.items) | {"texts": self.texts}

    def lines(self, *, of: str = "", here: str = "", held_out: bool = True) -> list[str]:
        """One line for each kind of content that is shared, with a remedy; empty if nothing is.

        Args:
            of: the data set that holds out.
            here: the data set that trains, if it is another one.
            held_out: False: all documents of `of` are evaluated.
        """
        owner, place = (f" of {of}" if of else ""), (f" of {here}" if here else "")
        whose = "held-out documents" if held_out else "documents"
        remedy = _TWO_SETS if here else _ONE_SET
        kinds = [(plural(name), pair) for name, pair in self.items.items()]
        return [
            f"{common:,} of {total:,} {what} ({common / total:.1%}) of {whose}{owner} are in training "
            f"documents{place} too, so held-out numbers measure memory. {remedy}"
            for what, (common, total) in (*kinds, ("pure texts", self.texts))
            if common
        ]

    def notes(self, *, of: str = "", here: str = "") -> list[str]:
        """`lines` as notes for the user."""
        return [f"note: {line}" for line in self.lines(of=of, here=here)]


@dataclass(frozen=True)
class Repeated:
    """What occurs more than once within the training split.

    Attributes:
        documents, texts: (number that equal an earlier one, number), of whole documents and of documents of text only.
        items: the same of items of modalities with a tokenizer, by modality.
        ids: (number of documents with the id of an earlier one, number of documents) of all splits; None: unknown.
    """

    documents: Pair
    items: Mapping[str, Pair]
    texts: Pair
    ids: Pair | None = None

    def named(self) -> dict[str, Pair | None]:
        """All pairs by the names that commands print as JSON."""
        return {"documents": self.documents} | _named(self.items) | {"texts": self.texts, "ids": self.ids}

    def rows(self) -> Iterator[tuple[str, str]]:
        """For each kind that repeats its name, as in `named`, and a line about it."""
        kinds = {"documents": ("documents", ""), "texts": ("pure texts", "")}
        kinds |= {_name(one): (plural(one), " (equal tokens, not equal files)") for one in self.items}
        for key, pair in self.named().items():
            if not pair or not pair[0]:
                continue
            common, total = pair
            share = f"({common / total:.1%})"
            if key == "ids":
                yield key, f"{common:,} of {total:,} documents {share} have the id of an earlier one"
                continue
            what, equal = kinds[key]
            yield (
                key,
                f"{common:,} of {total:,} training {what} {share} equal an earlier one: {total - common:,} are "
                f"different{equal}",
            )

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
    train, held_out = (keys_of(folder, manifest, split, tokens=tokens) for split in (TRAIN, VALIDATION))
    return common_content(held_out, train)


def common_content(own: ContentKeys, train: ContentKeys) -> Shared:
    """What evaluated documents have in common with training documents.

    Args:
        own: keys of evaluated documents.
        train: keys of training documents, with the same tokenizers.
    """
    nothing = ContentKeys().texts
    items = {name: _common(keys, train.items.get(name, nothing)) for name, keys in own.items.items() if len(keys)}
    return Shared(items, _common(own.texts, train.texts))


def repeated_content(train: SplitKeys) -> Repeated:
    """What training documents repeat."""
    items = {name: _again(keys) for name, keys in train.items.items() if len(keys)}
    return Repeated(_again(train.documents), items, _again(train.texts))


def in_training(
    folder: Path, manifest: Manifest, *, trained: tuple[Path, Manifest] | None = None, tokens: int = TOKENS
) -> frozenset[int]:
    """Numbers of the held-out documents of which an item, or the text without items, is in training documents too.

    Args:
        folder: the data set.
        manifest: of it.
        trained: another data set whose training documents are compared; None: those of this one.
        tokens: as in `shared_content`.
    """
    train = keys_of(*(trained or (folder, manifest)), TRAIN, tokens=tokens)
    own = keys_of(folder, manifest, VALIDATION, tokens=tokens)
    found = own.text_owners[np.isin(own.texts, train.texts)].tolist()
    for name, keys in own.items.items():
        found += own.owners[name][np.isin(keys, train.items.get(name, train.texts[:0]))].tolist()
    return frozenset(found)


def _name(modality: str) -> str:
    return "pictures" if modality == IMAGE else modality


def _named(items: Mapping[str, Pair]) -> dict[str, Pair]:
    return {"pictures": (0, 0)} | {_name(name): pair for name, pair in items.items()}


def _common(own: Keys, known: Keys) -> Pair:
    """How many of the keys are known, and how many there are. Several times faster than np.isin if both are sorted."""
    if not len(own) or not len(known):
        return 0, len(own)
    own, known = np.sort(own), np.sort(known)
    places = np.minimum(np.searchsorted(known, own), len(known) - 1)
    return int((known[places] == own).sum()), len(own)


def _again(keys: Keys) -> Pair:
    return len(keys) - len(np.unique(keys)), len(keys)
