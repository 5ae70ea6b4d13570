"""The common part of the orders of a source: sequences numbered from 0 through all passes, found block by block.

packing_cache.py and blocks.py define the content of a block. N sequences, K modalities.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.data.stream.as_read import DocumentReader
from mmscale.data.stream.causal_masking import Masking, SpanChoice
from mmscale.data.stream.packing import NO_SEQUENCES, Packing, pack_epoch
from mmscale.data.stream.source import Source

_BLOCKS_IN_MEMORY = 2


@dataclass(frozen=True)
class UnreadBlocks:
    """Blocks of a begun epoch of which nothing was read (order "blocks").

    Attributes:
        seed, position: they determine which documents each block of the epoch holds.
        epoch: number of the epoch.
        first: the first of the blocks; all later ones of the epoch follow.
        documents: number of documents in these blocks.
    """

    seed: int
    position: int
    epoch: int
    first: int
    documents: int


@dataclass(frozen=True, eq=False)
class StreamStart:
    """The beginning of a stream of a source that was read before, under other settings.

    Attributes:
        leftovers: number of each epoch that was begun, and its unread documents, ascending.
        epoch: the first epoch of which nothing was read.
        rest: blocks of a begun epoch that come after the leftovers.
    """

    leftovers: tuple[tuple[int, NDArray[np.int64]], ...] = ()
    epoch: int = 0
    rest: UnreadBlocks | None = None

    @property
    def unread(self) -> int:
        """Number of unread documents of begun epochs."""
        left = sum(len(documents) for _, documents in self.leftovers)
        return left + (self.rest.documents if self.rest else 0)

    @property
    def begun(self) -> int:
        """Number of epochs that were begun and have documents left."""
        return len({epoch for epoch, _ in self.leftovers} | ({self.rest.epoch} if self.rest else set()))


START = StreamStart()


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """How documents of a source are packed into sequences.

    Attributes:
        position: place of the source in the blend; it selects the random streams.
        seq_length: tokens of a sequence.
        seed: the run's seed.
        window: documents among which packing chooses.
        shuffle: False keeps the stored order.
        once: only the first epoch will be read, to its end.
        multiple: documents are padded to a multiple of this, which divides seq_length.
        masking: causal masking of the documents; None: none.
    """

    position: int
    seq_length: int
    seed: int
    window: int
    shuffle: bool = True
    once: bool = False
    multiple: int = 1
    masking: Masking | None = None

    def arguments(self) -> dict[str, Any]:
        """The arguments of `pack_epoch` that are the same for every epoch; names of cached files depend on them."""
        return {
            "seq_length": self.seq_length,
            "window": self.window,
            "seed": self.seed,
            "source": self.position,
            "shuffle": self.shuffle,
            "multiple": self.multiple,
        }

    def reader(self, source: Source) -> DocumentReader:
        """Reads the source's documents as these settings want them."""
        if self.masking is None:
            return DocumentReader(source)
        choice = SpanChoice(masking=self.masking, seed=self.seed, source=self.position, seq_length=self.seq_length)
        return DocumentReader(source, choice)


@dataclass(frozen=True, eq=False)
class Block:
    """Sequences that were packed together, with sums per sequence."""

    packing: Packing
    reader: DocumentReader

    @cached_property
    def _sums(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        assert self.packing.epochs is not None
        rows = self.reader.rows(self.packing.documents, self.packing.epochs)
        return self.packing.sums_of(rows.counts), self.packing.sums_of(rows.labels)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Tokens per modality of each sequence [N, K]."""
        return self._sums[0]

    @property
    def labels(self) -> NDArray[np.int64]:
        """Trained labels per modality of each sequence [N, K]."""
        return self._sums[1]


def pack_documents(reader: DocumentReader, documents: NDArray[np.int64], *, epoch: int, **settings: Any) -> Packing:
    """Packs documents of one epoch into sequences.

    Args:
        reader: reads the source.
        documents: their numbers, ascending; one that is read several times occurs as often.
        epoch: number of the epoch.
        settings: further arguments of `pack_epoch`.
    """
    if not len(documents):
        return NO_SEQUENCES
    found, copies = np.unique(documents, return_counts=True)
    repeated = copies if len(found) < len(documents) else None
    composed = reader.source.composed(
        found, epoch=epoch, seed=settings["seed"], position=settings["source"], seq_length=settings["seq_length"]
    )
    lengths = reader.rows(composed, np.full(len(found), epoch)).lengths
    packing = pack_epoch(lengths, epoch=epoch, copies=repeated, **settings)
    return Packing(packing.starts, composed[packing.documents])


class SequenceStream(ABC):
    """Sequences of one source, numbered from 0 through all epochs.

    Attributes:
        source: the documents.
        reader: reads them.
    """

    def __init__(self, source: Source, packing: PackSettings, *, begin: StreamStart) -> None:
        self.source = source
        self.reader = packing.reader(source)
        self._seq_length = packing.seq_length
        self._begin = begin
        self._ends: list[int] = []  # number of sequences up to the end of each counted block
        self._loaded: OrderedDict[int, Block] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """The state without data that can be read again, for worker processes that do not fork."""
        return {**self.__dict__, "_loaded": OrderedDict()}

    @property
    @abstractmethod
    def first_epoch(self) -> int:
        """Sequences of the first whole epoch: exact for one pass, an estimate for a large source otherwise."""

    @abstractmethod
    def position_after(self, taken: int, more: NDArray[np.int64]) -> StreamStart:
        """The position after some of this stream's sequences were read.

        Args:
            taken: sequences 0..taken-1 were read.
            more: further ones that were read, none below `taken`, ascending.
        """

    @abstractmethod
    def _make(self, number: int) -> Packing:
        """Sequences of one block: from the cache, or packed now."""

    @abstractmethod
    def _size(self, number: int, *, wanted: int) -> int:
        """Number of sequences of a block; all earlier blocks must be counted.

        `wanted` is the sequence that is searched for.
        """

    @abstractmethod
    def _epochs_in(self, number: int) -> Sequence[tuple[int, int]]:
        """Epochs that a block's documents belong to, in the order of its documents, and their numbers of documents."""

    @abstractmethod
    def _last_epoch(self, number: int) -> int:
        """The last of these epochs. No later block has an earlier one."""

    def locate(self, number: int) -> tuple[int, int]:
        """Block of a sequence of the stream, and its place inside the block."""
        while not self._ends or self._ends[-1] <= number:
            self._count_to(len(self._ends), wanted=number)
        block = bisect_right(self._ends, number)
        return block, number - (self._ends[block - 1] if block else 0)

    def sequences_of(self, passes: int, most: int) -> int | None:
        """Sequences of this stream that belong to the first passes over the source, if at most `most`; None: more.

        Args:
            passes: counted from the beginning of the run, so those that are behind `begin` have no sequences here.
            most: the blocks of this many sequences are counted at most, and none if their number of tokens says that
                there are more.
        """
        least = self._least(passes)
        if least > most:
            return None
        for number in itertools.count():
            before = self._ends[number - 1] if number else 0
            if before > most:
                return None
            if self._last_epoch(number) >= passes:
                break
            self._count_to(number, wanted=min(most, self._about(passes)))
        documents = sum(count for epoch, count in self._epochs_in(number) if epoch < passes)
        inside = int(np.searchsorted(self.block(number).packing.starts, documents)) if documents else 0
        return before + inside if before + inside <= most else None

    def _least(self, passes: int) -> int:
        """A number of sequences that the rest of the first passes has at least."""
        if self.source.selection is not None:
            return 0  # an epoch has other tokens than the source
        return max(0, passes - self._begin.epoch) * self.source.tokens // self._seq_length

    def _about(self, passes: int) -> int:
        """About how many sequences the rest of the first passes has: so many are counted together."""
        rest = self._begin.rest
        begun = rest.documents / len(self.source) if rest is not None and rest.epoch < passes else 0.0
        return int((max(0, passes - self._begin.epoch) + begun) * self.source.tokens / self._seq_length)

    def _count_to(self, number: int, *, wanted: int) -> None:
        """Count the sequences up to a block's end; `wanted` as of `_size`."""
        while len(self._ends) <= number:
            size = self._size(len(self._ends), wanted=wanted)
            self._ends.append((self._ends[-1] if self._ends else 0) + size)

    def stretch(self, start: int, count: int) -> Iterator[tuple[Block, NDArray[np.int64]]]:
        """The sequences start..start+count-1, divided at the boundaries of blocks: a block and places inside it."""
        while count > 0:
            number, place = self.locate(start)
            block = self.block(number)
            taken = min(count, len(block.packing) - place)
            yield block, np.arange(place, place + taken)
            start, count = start + taken, count - taken

    def block(self, number: int) -> Block:
        """One block: from memory, from the cache, or packed now."""
        if number not in self._loaded:
            epochs, documents = zip(*self._epochs_in(number), strict=True)
            packing = replace(self._make(number), epochs=np.repeat(epochs, documents))
            while len(self._loaded) >= _BLOCKS_IN_MEMORY:
                self._loaded.popitem(last=False)
            self._loaded[number] = Block(packing, self.reader)
        return self._loaded[number]

    def _unread(self, number: int, taken: int, more: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64]]]:
        """Epochs of a block and their unread documents, ascending; arguments as for `behind`."""
        packing = self.block(number).packing
        queries = self.source.queries(packing.documents)
        sequences = np.arange(len(packing)) + (self._ends[number - 1] if number else 0)
        read = np.repeat((sequences < taken) | np.isin(sequences, more), np.diff(packing.starts))
        found, end = [], 0
        for epoch, documents in self._epochs_in(number):
            start, end = end, end + documents
            found.append((epoch, np.sort(queries[start:end][~read[start:end]])))
        return found
