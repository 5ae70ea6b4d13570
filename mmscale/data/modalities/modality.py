"""The interface of a modality besides text: how its items are read, converted to codes and back, and written.

The table is in table.py; no other module depends on the name of a modality. Text is not in it: items are embedded in
text, which has any length and the first id range.

Letters: n items, T tokens of an item.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from mmscale.config import PrepareConfig
from mmscale.data.documents.refusal import BadDocumentError
from mmscale.data.documents.schema import Document, DocumentSlice, Item, SplitName
from mmscale.data.modalities.patches import codebook

Values = NDArray[Any]  # one item, in the form that its modality uses: pixels uint8 [H, W, C], samples float32 [S]
Codes = NDArray[np.int64]
Tally = dict[str, float]  # counts of conversions applied to items when they were read, by keys of the modality


class Codec(Protocol):
    """A fitted tokenizer of one modality: items to codes and back. Codes are 0..vocab_size-1."""

    kind: str

    @property
    def vocab_size(self) -> int:
        """Number of codes."""

    @property
    def tokens_per_item(self) -> int:
        """T, equal for every item [tokens]."""

    def encode(self, items: Values) -> Codes:
        """Items [n, ...] to codes int64 [n, T]."""

    def decode(self, codes_nT: Codes) -> Values:
        """Codes int [n, T] to items [n, ...].

        Raises:
            ValueError, DataError: this tokenizer cannot decode.
        """

    def fingerprint(self) -> str:
        """Hash of everything that affects the codes of an item."""

    def save(self, folder: Path) -> None:
        """Write the tokenizer into a folder, for `Modality.load`."""


class Modality(Protocol):
    """One modality. The methods are static; a class is an entry of the table.

    Attributes:
        name: in vocab.modalities, and the `type` of its items in documents.
        plural: what messages call several items; it may be missing, then they are "NAME items".
        suffixes: of its files in WebDataset archives, without the dot.
        written: suffix of the files that it writes, with the dot.
        files: written by `Codec.save`; needed for downloads from a hub.
        shipped: whether its module imports nothing of mmscale, so that `convert to-hf` can copy it next to the weights.
    """

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    written: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    shipped: ClassVar[bool]

    @staticmethod
    def fit(settings: Mapping[str, Any], items: Sample, codes: int, report: Report) -> Codec | None:
        """A tokenizer for the items of training documents; deterministic for the same items.

        Args:
            settings: `data.prepare.modalities.NAME`.
            items: a sample of the items.
            codes: ids of the modality's range.
            report: receives messages.

        Returns:
            None if there are no items.

        Raises:
            ValueError: settings are unknown or do not fit each other.
        """

    @staticmethod
    def load(folder: Path) -> Codec:
        """Read a tokenizer that `Codec.save` wrote.

        Raises:
            ValueError, OSError: it is missing or damaged.
        """

    @staticmethod
    def read(source: Any, codec: Any) -> Values:
        """One item in the form that its tokenizer needs.

        Args:
            source: a file (`Path`), the bytes of a file, or values.
            codec: knows sizes and rates.

        Raises:
            ValueError: it cannot be read; the document is rejected.
        """

    @staticmethod
    def write(values: Values, file: Path, codec: Any) -> None:
        """Write one item as a file."""

    @staticmethod
    def picture(values: Values, codec: Any) -> NDArray[np.uint8]:
        """One item as a picture for contact sheets and reports, uint8 [H, W, C]."""

    @staticmethod
    def quality(codec: Any, items: Values) -> dict[str, Any]:
        """How well items are reconstructed: at least `codes_used`, and `said`, a text for the terminal."""


def count(tally: Tally, amounts: Mapping[str, float]) -> None:
    """Add amounts to a tally."""
    for key, amount in amounts.items():
        tally[key] = tally.get(key, 0) + amount


class Checking(Protocol):
    """Additional method of a modality that can refuse settings before a document is read."""

    @staticmethod
    def check(settings: Mapping[str, Any], prepare: PrepareConfig, codes: int) -> Codec | None:
        """Refuse settings with which `Modality.fit` cannot make a tokenizer.

        Args:
            settings: `data.prepare.modalities.NAME`.
            prepare: `data.prepare`.
            codes: ids of the modality's range.

        Returns:
            The tokenizer, if it needs no items and is read quickly; its number of codes is checked.

        Raises:
            ValueError: settings are unknown or do not fit each other.
        """


class Counting(Protocol):
    """Additional methods of a modality whose items are converted with losses when they are read."""

    @staticmethod
    def read_counted(source: Any, codec: Any, tally: Tally) -> Values:
        """As `Modality.read`, and counts the conversions of the item."""

    @staticmethod
    def remarks(tally: Mapping[str, float], codec: Any) -> list[str]:
        """Sentences for the terminal about the counts; empty if nothing was lost."""


class Salvaging(Protocol):
    """Additional methods of a modality whose damaged items are partly usable."""

    @staticmethod
    def salvage(source: Any) -> Values:
        """The readable part of a damaged item, as a source for `Modality.read`.

        Raises:
            ValueError: nothing can be read.
        """


class OnDevice(Protocol):
    """Additional method of a tokenizer that can compute on a GPU."""

    def use_device(self, number: int) -> None:
        """Compute on a GPU from now on; codes stay the same.

        Args:
            number: of this process among those that share the machine's GPUs.

        Raises:
            ConfigError: there is no GPU.
        """


@dataclass(frozen=True)
class Report:
    """Receives messages while a tokenizer is fitted.

    Attributes:
        on_progress: receives the state of a long step, which is shown temporarily.
        say: receives a permanent line.
    """

    on_progress: Callable[[str], None]
    say: Callable[[str], None]


@dataclass(frozen=True)
class Sample:
    """Items of one modality in documents that are being prepared.

    Attributes:
        modality: its name.
        slices: the documents.
        settings: `data.prepare`.
    """

    modality: str
    slices: Sequence[DocumentSlice]
    settings: PrepareConfig

    def items(self, split: SplitName, limit: int) -> Iterator[Item]:
        """Items of a split, at most `limit`, the same number from the start of every slice."""
        share = -(-limit // max(1, len(self.slices)))
        for piece in self.slices:
            documents = (item for item in piece.read() if isinstance(item, Document))
            chosen = (one for one in documents if one.split_for(self.settings.held_out) == split)
            yield from itertools.islice((item for one in chosen for item in one.items(self.modality)), share)

    def values(self, split: SplitName, limit: int, read: Callable[[Any], Values]) -> Iterator[Values]:
        """The values of these items; those that cannot be read are left out.

        Args:
            split: of which documents.
            limit: items at most.
            read: converts the source of an item to values; raises ValueError or BadDocumentError.
        """
        for item in self.items(split, limit):
            try:
                yield read(item.source)
            except (ValueError, BadDocumentError):
                continue

    @staticmethod
    def codebook(vectors_ND: NDArray[np.uint8], codes: int, report: Report) -> NDArray[np.uint8]:
        """A k-means codebook of bytes, as `patches.codebook`.

        Args:
            vectors_ND: uint8 [N, D], at least one.
            codes: entries at most.
            report: receives the progress.
        """
        return codebook(vectors_ND, codes, on_progress=report.on_progress)
