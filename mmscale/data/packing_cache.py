"""The endless stream of packed sequences of one source, epoch after epoch, with its packings kept on disk.

A lost, damaged or unwritable cache costs time, never the order: a packing is a pure function of data and settings.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import socket
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.data.arrays import read_array
from mmscale.data.packing import Packing, check_lengths, pack_epoch
from mmscale.data.source import Source

log = logging.getLogger(__name__)

# Raise it when packing.py gives another order for the same input: caches of the old order are then left aside.
ORDER = 1
_HEADER = 3  # crc32 of the rest, sequences, documents
_BLOCKS_IN_MEMORY = 2
# Small sources keep several epochs in one file: with one file an epoch, 1800 documents would soon mean thousands of
# files, and resuming would read them all.
_BLOCK_DOCUMENTS = 65_536


@dataclass(frozen=True, eq=False)
class Begin:
    """Where a stream of a source begins that was read before, under other settings.

    Attributes:
        leftovers: number of each epoch that was begun, and its documents that were not read, ascending.
        epoch: the first epoch of which nothing was read.
    """

    leftovers: tuple[tuple[int, NDArray[np.int64]], ...] = ()
    epoch: int = 0

    @property
    def unread(self) -> int:
        """Documents that are left of epochs that were begun."""
        return sum(len(documents) for _, documents in self.leftovers)


START = Begin()


@dataclass(frozen=True, eq=False)
class Block:
    """One packed epoch of a source, or several consecutive ones of a small source, with sums per sequence."""

    packing: Packing
    source: Source

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Tokens per modality of each sequence [N, K]."""
        return self.packing.sums(self.source.counts)

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Trained labels per modality of each sequence [N, K]."""
        return self.packing.sums(self.source.labels)


class PackedStream:
    """Sequences of one source, numbered from 0 through all epochs.

    Args:
        source: the documents.
        position: place of the source in the blend; it selects the random streams.
        seq_length: tokens of a sequence.
        seed: the run's seed.
        window: documents among which packing chooses.
        shuffle: False keeps the stored order.
        once: only the first epoch will be read.
        cache: folder of packing indices.
        begin: what was read before: what is left of begun epochs comes first, as a block of its own.

    Raises:
        DataError: a document is longer than a sequence.
    """

    def __init__(
        self,
        source: Source,
        *,
        position: int,
        seq_length: int,
        seed: int,
        window: int,
        shuffle: bool,
        once: bool,
        cache: Path,
        begin: Begin = START,
    ) -> None:
        check_lengths(source.lengths, seq_length=seq_length, what=f"data: {source.folder} ({source.split})")
        self.source = source
        self._settings: dict[str, Any] = {
            "seq_length": seq_length,
            "window": window,
            "seed": seed,
            "source": position,
            "shuffle": shuffle,
        }
        self._epochs = 1 if once else max(1, _BLOCK_DOCUMENTS // len(source))  # of a block
        self._begin = begin
        listing: list[Any] = [ORDER, source.identity, self._epochs, self._settings]
        if begin.leftovers or begin.epoch:
            left = [[epoch, zlib.crc32(np.ascontiguousarray(documents).data)] for epoch, documents in begin.leftovers]
            listing += [begin.epoch, left, begin.unread]
        content = json.dumps(listing, sort_keys=True)
        self._key = hashlib.sha256(content.encode()).hexdigest()[:16]
        self._cache = cache
        self._ends: list[int] = []  # sequences up to the end of each block that was looked at
        self._loaded: OrderedDict[int, Block] = OrderedDict()
        # Epochs do not share sequences, so the first one ends where its last document's sequence does.
        if begin.leftovers:
            self.block(0)  # blocks are numbered in the order in which they are first looked at
        whole = self.block(1 if begin.leftovers else 0)
        self.first_epoch = int(np.searchsorted(whole.packing.starts, len(source)))

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be read again, for worker processes that do not fork."""
        return {**self.__dict__, "_loaded": OrderedDict()}

    def locate(self, number: int) -> tuple[int, int]:
        """Block of a sequence of the stream, and its place inside the block."""
        while not self._ends or self._ends[-1] <= number:
            self.block(len(self._ends))
        block = bisect_right(self._ends, number)
        return block, number - (self._ends[block - 1] if block else 0)

    def stretch(self, start: int, count: int) -> Iterator[tuple[Block, NDArray[np.int64]]]:
        """The sequences start..start+count-1, cut at blocks' borders: a block and places inside it."""
        while count > 0:
            number, place = self.locate(start)
            block = self.block(number)
            taken = min(count, len(block.packing) - place)
            yield block, np.arange(place, place + taken)
            start, count = start + taken, count - taken

    def block(self, number: int) -> Block:
        """One block: from memory, from the cache, or packed now."""
        if number not in self._loaded:
            packing = self._read(number) or self._build(number)
            if number == len(self._ends):
                self._ends.append((self._ends[-1] if self._ends else 0) + len(packing))
            while len(self._loaded) >= _BLOCKS_IN_MEMORY:
                self._loaded.popitem(last=False)
            self._loaded[number] = Block(packing, self.source)
        return self._loaded[number]

    def _file(self, number: int) -> Path:
        return self._cache / f"packing-{self._key}-{number}.npy"

    def _read(self, number: int) -> Packing | None:
        """The cached packing; None if there is none or it is damaged."""
        path = self._file(number)
        try:
            # Mapped: the processes of a node share one copy in the page cache.
            content = read_array(path, mapped=True)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError) as error:
            log.warning("data: packing index %s cannot be read and is made again: %s", path, error)
            return None
        if content.dtype == np.int64 and content.ndim == 1 and len(content) > _HEADER:
            crc, sequences, documents = content[:_HEADER].tolist()
            if (
                documents == sum(len(self._documents(epoch)) for epoch in self._epochs_of(number))
                and len(content) == _HEADER + sequences + 1 + documents
                and crc == zlib.crc32(content[_HEADER:].data)
            ):
                border = _HEADER + sequences + 1
                return Packing(content[_HEADER:border], content[border:])
        log.warning("data: packing index %s is damaged and is made again", path)
        return None

    def _build(self, number: int) -> Packing:
        """Pack a block and keep it; of several processes one packs and the others wait for its file."""
        with self._lock() as writable:
            packing = self._read(number) if writable else None
            if packing is None:
                packing = Packing.joined([self._packed(epoch) for epoch in self._epochs_of(number)])
                if writable:
                    self._write(number, packing)
        return packing

    def _epochs_of(self, number: int) -> Sequence[int]:
        """Epochs of a block: those that were begun come first, then whole ones."""
        if self._begin.leftovers:
            if number == 0:
                return [epoch for epoch, _ in self._begin.leftovers]
            number -= 1
        first = self._begin.epoch + number * self._epochs
        return range(first, first + self._epochs)

    def _documents(self, epoch: int) -> NDArray[np.int64] | range:
        """Documents that this stream reads in an epoch."""
        return next((left for number, left in self._begin.leftovers if number == epoch), range(len(self.source)))

    def _packed(self, epoch: int) -> Packing:
        documents = self._documents(epoch)
        if isinstance(documents, range):
            return pack_epoch(self.source.lengths, epoch=epoch, **self._settings)
        packing = pack_epoch(self.source.lengths[documents], epoch=epoch, **self._settings)
        return Packing(packing.starts, documents[packing.documents])

    def behind(self, taken: int, more: NDArray[np.int64]) -> Begin:
        """Where a stream goes on after some of this one's sequences were read.

        Args:
            taken: sequences 0..taken-1 were read.
            more: further ones that were read, none below `taken`, ascending.
        """
        last = int(more[-1]) if len(more) else taken - 1
        if last < 0:
            return self._begin
        first_block, last_block = self.locate(taken)[0], self.locate(last)[0]
        found: list[tuple[int, NDArray[np.int64]]] = []
        for number in range(first_block, max(first_block, last_block) + 1):
            packing = self.block(number).packing
            sequences = np.arange(len(packing)) + (self._ends[number - 1] if number else 0)
            read = np.repeat((sequences < taken) | np.isin(sequences, more), np.diff(packing.starts))
            end = 0
            for epoch in self._epochs_of(number):
                start, end = end, end + len(self._documents(epoch))
                found.append((epoch, np.sort(packing.documents[start:end][~read[start:end]])))
        begun = [epoch + 1 for epoch, left in found if len(left) < len(self.source)]
        following = max([self._begin.epoch, *begun, *self._epochs_of(first_block)[:1]])
        return Begin(tuple((epoch, left) for epoch, left in found if epoch < following and len(left)), following)

    def _write(self, number: int, packing: Packing) -> None:
        """Write whole or not at all; a full disk or a folder without write permission is no error."""
        body = np.concatenate([packing.starts, packing.documents])
        header = np.array([zlib.crc32(body.data), len(packing), len(packing.documents)])
        path = self._file(number)
        temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                np.save(file, np.concatenate([header, body]), allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            log.warning("data: packing index %s cannot be written, it stays in memory: %s", path, error)
            temporary.unlink(missing_ok=True)

    @contextmanager
    def _lock(self) -> Iterator[bool]:
        """Hold the lock of this stream's files. Yields whether the cache can be written.

        The lock only saves work: without one (some network file systems) every process packs for itself, and since
        all get the same bytes and files appear whole, the last writer does no harm.
        """
        try:
            self._cache.mkdir(parents=True, exist_ok=True)
            file = (self._cache / f"packing-{self._key}.lock").open("a")
        except OSError as error:
            log.warning("data: no packing cache in %s, indices stay in memory: %s", self._cache, error)
            yield False
            return
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                for stale in self._cache.glob(f"packing-{self._key}-*.tmp"):  # left by a process that was killed
                    stale.unlink(missing_ok=True)
            except OSError as error:
                log.warning("data: %s cannot be locked: %s", file.name, error)
            yield True
