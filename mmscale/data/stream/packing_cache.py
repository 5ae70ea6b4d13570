"""The order "epochs": all documents of an epoch are shuffled and packed at once. Packings are cached on disk.

A lost, damaged or unwritable cache costs time but never changes the order: a packing is a pure function of data and
settings.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.data.arrays import read_array
from mmscale.data.stream.cache_files import locked, write_array
from mmscale.data.stream.packing import Packing, check_lengths, pack_epoch
from mmscale.data.stream.sequences import START, PackSettings, SequenceStream, StreamStart, pack_documents
from mmscale.data.stream.source import Source

log = logging.getLogger(__name__)

# Increase it when packing.py gives another order for the same input, so that older caches are ignored.
ORDER = 1
_HEADER = 3  # crc32 of the rest, sequences, documents
# Small sources store several epochs in one file. With one file per epoch, 1800 documents would soon result in thousands
# of files, which resuming would have to read.
_BLOCK_DOCUMENTS = 65_536


class PackedStream(SequenceStream):
    """Sequences of one source whose epochs are shuffled and packed at once (order "epochs").

    Args:
        source: the documents.
        packing: how they are packed into sequences.
        cache: folder of packing indices.
        begin: what was read before; the leftovers of begun epochs come first, as a separate block.

    Raises:
        DataError: a document is longer than a sequence.
    """

    def __init__(self, source: Source, packing: PackSettings, *, cache: Path, begin: StreamStart = START) -> None:
        check_lengths(source.lengths, seq_length=packing.seq_length, what=f"data: {source.folder} ({source.split})")
        super().__init__(source, packing, begin=begin)
        self._settings = packing.arguments()
        if packing.multiple == 1:  # the names of cached packings are those of earlier versions
            del self._settings["multiple"]
        self._epochs = 1 if packing.once else max(1, _BLOCK_DOCUMENTS // len(source))  # epochs of a block
        listing: list[Any] = [ORDER, source.identity, self._epochs, self._settings]
        if packing.masking is not None:
            listing.append(asdict(packing.masking))
        if begin.leftovers or begin.epoch:
            left = [[epoch, zlib.crc32(np.ascontiguousarray(documents).data)] for epoch, documents in begin.leftovers]
            listing += [begin.epoch, left, begin.unread]
        content = json.dumps(listing, sort_keys=True)
        self._key = hashlib.sha256(content.encode()).hexdigest()[:16]
        self._cache = cache
        # Epochs do not share sequences, so the first one ends with the sequence of its last document.
        whole = self.block(1 if begin.leftovers else 0)
        self._first_epoch = int(np.searchsorted(whole.packing.starts, len(self._documents(begin.epoch))))

    @property
    def first_epoch(self) -> int:
        """Sequences of the first whole epoch."""
        return self._first_epoch

    def _make(self, number: int) -> Packing:
        return self._read(number) or self._build(number)

    def _size(self, number: int, *, wanted: int) -> int:
        return len(self.block(number).packing)

    def _epochs_in(self, number: int) -> list[tuple[int, int]]:
        return [(epoch, len(self._documents(epoch))) for epoch in self._epochs_of(number)]

    def _last_epoch(self, number: int) -> int:
        return self._epochs_of(number)[-1]

    def _file(self, number: int) -> Path:
        return self._cache / f"packing-{self._key}-{number}.npy"

    def _read(self, number: int) -> Packing | None:
        """The cached packing; None if there is none or it is damaged."""
        path = self._file(number)
        try:
            # Mapped, so that the processes of a node share one copy in the page cache.
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
        """Pack a block and store it. If several processes need it, one packs and the others wait for its file."""
        with locked(self._cache, f"packing-{self._key}") as writable:
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
        """Documents that this stream reads in an epoch, ascending; repeated ones occur several times."""
        left = next((left for number, left in self._begin.leftovers if number == epoch), None)
        if left is not None:
            return left
        whole = range(len(self.source))
        return whole if self.source.selection is None else self.source.of_epoch(np.arange(len(whole)), epoch)

    def _packed(self, epoch: int) -> Packing:
        documents = self._documents(epoch)
        if isinstance(documents, range) and not self.source.composes:
            return pack_epoch(self.reader.lengths(epoch), epoch=epoch, **self._settings)
        return pack_documents(self.reader, np.asarray(documents), epoch=epoch, **self._settings)

    def position_after(self, taken: int, more: NDArray[np.int64]) -> StreamStart:
        """The position after some of this stream's sequences were read.

        Args:
            taken: sequences 0..taken-1 were read.
            more: further ones that were read, none below `taken`, ascending.
        """
        last = int(more[-1]) if len(more) else taken - 1
        if last < 0:
            return self._begin
        first_block, last_block = self.locate(taken)[0], self.locate(last)[0]
        numbers = range(first_block, max(first_block, last_block) + 1)
        found = [one for number in numbers for one in self._unread(number, taken, more)]
        begun = [epoch + 1 for epoch, left in found if len(left) < len(self._documents(epoch))]
        following = max([self._begin.epoch, *begun, *self._epochs_of(first_block)[:1]])
        return StreamStart(tuple((epoch, left) for epoch, left in found if epoch < following and len(left)), following)

    def _write(self, number: int, packing: Packing) -> None:
        """Write atomically; a full disk or a folder without write permission is not an error."""
        body = np.concatenate([packing.starts, packing.documents])
        header = np.array([zlib.crc32(body.data), len(packing), len(packing.documents)])
        write_array(self._file(number), np.concatenate([header, body]))
