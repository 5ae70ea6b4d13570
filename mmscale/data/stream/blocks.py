"""The order "blocks": documents of a large source are shuffled across and inside blocks that are packed one by one.

Chunks of consecutive documents are shuffled by a permutation of which any element can be computed alone (feistel.py),
and each block holds the same number of chunks, up to a difference of one. A block is packed like an epoch of a small
source (packing.py). So time and memory do not depend on the number of documents. The position of a block's first
sequence in the stream follows from the counts of all earlier blocks, which are stored (block_counts.py).
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmscale.data.stream.block_counts import BlockCounts
from mmscale.data.stream.feistel import ROUNDS, Shuffle
from mmscale.data.stream.packing import NO_SEQUENCES, Packing, Purpose, check_lengths, random_bits
from mmscale.data.stream.sequences import START, PackSettings, SequenceStream, StreamStart, UnreadBlocks, pack_documents
from mmscale.data.stream.source import Source
from mmscale.errors import DataError
from mmscale.tables.settings import DataOrder

# Increase it when the same input gives another order.
ORDER = 1
_LEFT = 1 << 62  # block number, for `pack_epoch`, of the leftover documents of an epoch
_FEW = 2  # if more counts than this are missing, they are computed together with other processes


@dataclass(frozen=True)
class Division:
    """A source's documents divided into blocks, differently in each epoch.

    Attributes:
        documents: number of documents of the source.
        order: sizes of blocks and chunks.
    """

    documents: int
    order: DataOrder

    @property
    def chunks(self) -> int:
        """Number of chunks of consecutive documents; the last one may be smaller."""
        return -(-self.documents // self.order.chunk)

    def __len__(self) -> int:
        """Number of blocks of an epoch, with at least `order.block` documents each if the source has so many."""
        return max(1, self.chunks // max(1, self.order.block // self.order.chunk))

    def members(self, number: int, *, seed: int, position: int, epoch: int, shuffle: bool = True) -> NDArray[np.int64]:
        """Numbers of the documents of a block, ascending, int64.

        Args:
            number: of the block.
            seed: of the data order.
            position: of the source in the blend.
            epoch: which pass.
            shuffle: whether chunks are permuted; otherwise blocks are consecutive documents.
        """
        places = np.arange(self._first(number), self._first(number + 1))
        if shuffle:
            places = np.sort(self._shuffle(seed, position, epoch).at(places))
        found = (places[:, None] * self.order.chunk + np.arange(self.order.chunk)).ravel()
        return found[found < self.documents]

    def position_after(self, number: int, *, seed: int, position: int, epoch: int) -> int:
        """Number of documents in this block of a shuffled epoch and in all later blocks. Arguments as for `members`."""
        last = self.chunks - 1
        found = (self.chunks - self._first(number)) * self.order.chunk
        if self._shuffle(seed, position, epoch).place_of(np.array([last]))[0] >= self._first(number):
            found -= self.chunks * self.order.chunk - self.documents  # the last chunk is smaller
        return found

    def _first(self, number: int) -> int:
        """Place of a block's first chunk in the shuffled order of chunks."""
        return self.chunks * number // len(self)

    def _shuffle(self, seed: int, position: int, epoch: int) -> Shuffle:
        keys = random_bits(ROUNDS, seed=seed, source=position, purpose=Purpose.CHUNKS, number=epoch)
        return Shuffle(self.chunks, keys=keys)


@dataclass(frozen=True, eq=False)
class _Portion:
    """Documents of one epoch that are packed together, with the number that seeds their random order."""

    epoch: int
    number: int
    documents: NDArray[np.int64]


class BlockStream(SequenceStream):
    """Sequences of one source whose epochs are shuffled and packed in blocks (order "blocks").

    Args:
        source: the documents.
        packing: how they are packed into sequences.
        order: sizes of blocks and chunks.
        folders: where the counts of sequences may be stored.
        begin: what was read before. The leftovers of begun blocks come first, then the rest of a begun epoch.
    """

    def __init__(
        self,
        source: Source,
        packing: PackSettings,
        *,
        order: DataOrder,
        folders: Sequence[Path],
        begin: StreamStart = START,
    ) -> None:
        super().__init__(source, packing, begin=begin)
        self._division = Division(len(source), order)
        self._packing = packing
        self._settings = packing.arguments()
        left = [[epoch, zlib.crc32(np.ascontiguousarray(documents).data)] for epoch, documents in begin.leftovers]
        listing = [ORDER, source.identity, [order.block, order.chunk], self._settings, begin.epoch, left, begin.unread]
        listing.append(None if begin.rest is None else [begin.rest.seed, begin.rest.position, begin.rest.first])
        if packing.masking is not None:
            listing.append(asdict(packing.masking))
        self._key = hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()[:16]
        self._counts = BlockCounts(folders, self._key)

    @property
    def first_epoch(self) -> int:
        """Sequences of the first whole epoch: exact for one pass, otherwise extrapolated from the first block."""
        blocks = len(self._division)
        if self._packing.once:
            self._count_all(blocks)
            return self._ends[blocks - 1]
        number = 1 if self._begin.leftovers else 0
        seed, position, epoch, block = self._address(number)
        members = self._division.members(block, seed=seed, position=position, epoch=epoch)
        return max(1, round(len(self.block(number).packing) * len(self.source) / len(members)))

    def _count_all(self, blocks: int) -> None:
        """Count the sequences of the first blocks."""
        missing = [number for number in range(len(self._ends), blocks) if self._counts.get(number) is None]
        if len(missing) > _FEW:
            self._counts.find(missing, self._count)
        while len(self._ends) < blocks:
            self._ends.append((self._ends[-1] if self._ends else 0) + self._counted(len(self._ends)))

    def position_after(self, taken: int, more: NDArray[np.int64]) -> StreamStart:
        """The position after some of this stream's sequences were read; arguments as in the base class."""
        last = int(more[-1]) if len(more) else taken - 1
        if last < 0:
            return self._begin
        first_block, last_block = self.locate(taken)[0], self.locate(last)[0]
        following = max(first_block, last_block) + 1
        left: dict[int, list[NDArray[np.int64]]] = {}
        for number in range(first_block, following):
            for epoch, documents in self._unread(number, taken, more):
                if len(documents):
                    left.setdefault(epoch, []).append(documents)
        leftovers = tuple((epoch, np.sort(np.concatenate(parts))) for epoch, parts in sorted(left.items()))
        seed, position, epoch, block = self._address(following)
        if block == 0:
            return StreamStart(leftovers, epoch)
        unread = self._division.position_after(block, seed=seed, position=position, epoch=epoch)
        rest = UnreadBlocks(seed=seed, position=position, epoch=epoch, first=block, documents=unread)
        return StreamStart(leftovers, epoch + 1, rest)

    def _address(self, number: int) -> tuple[int, int, int, int]:
        """Seed, position, epoch, and number within the epoch, of a block of the stream that does not hold leftovers."""
        if self._begin.leftovers:
            number -= 1
        rest = self._begin.rest
        if rest is not None:
            blocks = len(self._division) - rest.first
            if number < blocks:
                return rest.seed, rest.position, rest.epoch, rest.first + number
            number -= blocks
        epoch, block = divmod(number, len(self._division))
        return self._packing.seed, self._packing.position, self._begin.epoch + epoch, block

    def _portions(self, number: int) -> list[_Portion]:
        """The documents of a block of the stream."""
        if number == 0 and self._begin.leftovers:
            return [_Portion(epoch, _LEFT, documents) for epoch, documents in self._begin.leftovers]
        seed, position, epoch, block = self._address(number)
        members = self._division.members(
            block, seed=seed, position=position, epoch=epoch, shuffle=self._packing.shuffle
        )
        return [_Portion(epoch, 1 + block, self.source.of_epoch(members, epoch))]

    def _epochs_in(self, number: int) -> list[tuple[int, int]]:
        return [(portion.epoch, len(portion.documents)) for portion in self._portions(number)]

    def _last_epoch(self, number: int) -> int:
        if number == 0 and self._begin.leftovers:
            return self._begin.leftovers[-1][0]
        return self._address(number)[2]

    def _pack(self, number: int) -> Packing:
        parts = [NO_SEQUENCES]
        for portion in self._portions(number):
            if not len(portion.documents):
                continue
            lengths = self.source.rows(portion.documents).lengths
            check_lengths(
                lengths,
                seq_length=self._packing.seq_length,
                what=f"data: {self.source.folder} ({self.source.split}), a block",
                numbers=portion.documents,
            )
            parts.append(
                pack_documents(
                    self.reader, portion.documents, epoch=portion.epoch, block=portion.number, **self._settings
                )
            )
        return Packing.joined(parts)

    def _make(self, number: int) -> Packing:
        packing = self._pack(number)
        known = self._counts.get(number)
        if known is not None and known != len(packing):
            raise DataError(
                f"data: block {number} of {self.source.folder} has {len(packing)} sequences, {known} were counted "
                "before: its tables have changed",
                remedy="delete the counts-*.npy of its packing cache, and do not go on with a run that has read it",
            )
        self._counts.add(number, len(packing))
        return packing

    def _count(self, number: int) -> int:
        return len(self._pack(number))

    def _counted(self, number: int) -> int:
        known = self._counts.get(number)
        return len(self.block(number).packing) if known is None else known

    def _size(self, number: int, *, wanted: int) -> int:
        if self._counts.get(number) is None:
            # An estimate that ignores padding, so that at most a few blocks too many are counted.
            each = max(1, self.source.tokens // len(self._division) // self._packing.seq_length)
            guess = number + 1 + (wanted - (self._ends[-1] if self._ends else 0)) // each
            if guess - number > _FEW:
                self._counts.find(range(number, guess), self._count)
        return self._counted(number)
