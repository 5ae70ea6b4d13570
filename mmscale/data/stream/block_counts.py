"""The number of sequences of each block of a stream: computed by several processes together, and stored in a file.

A count is a pure function of data and settings, so a lost or damaged file costs time but never changes the order.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mmscale.data.arrays import read_array
from mmscale.data.stream.cache_files import locked, write_array

log = logging.getLogger(__name__)

_UNKNOWN = -1
_SAVE_EVERY = 5.0  # interval in which counts of other processes are read and own ones are written [s]
_REPORT_EVERY = 30.0  # seconds


class BlockCounts:
    """The known numbers of sequences of the blocks of one stream.

    Args:
        folders: where counts may be stored. All are read; the first writable one is written to.
        key: of the stream.
    """

    def __init__(self, folders: Sequence[Path], key: str) -> None:
        self._folders, self._key = tuple(folders), key
        self._found: dict[int, int] = {}
        self._seen: dict[Path, tuple[int, int]] = {}  # inode and time of each file when it was read
        self._kept: dict[Path, frozenset[int]] = {}  # blocks in each file when it was last read

    def get(self, number: int) -> int | None:
        """Number of sequences of a block; None if it is unknown."""
        if number not in self._found:
            self.refresh()
        return self._found.get(number)

    def add(self, number: int, count: int) -> None:
        """Store a block's count, also for other processes and later runs."""
        if self.get(number) is None:
            self._found[number] = count
            self._save()

    def find(self, numbers: Sequence[int], count: Callable[[int], int]) -> None:
        """Count blocks, together with all other processes that need the same counts at this time.

        Each process counts missing blocks in random order, and reads the counts of the others every few seconds.

        Args:
            numbers: of the blocks.
            count: counts a block's sequences.
        """
        self.refresh()
        rng = np.random.default_rng([os.getpid(), zlib.crc32(socket.gethostname().encode())])
        saved = reported = time.monotonic()
        while missing := [number for number in numbers if number not in self._found]:
            for number in rng.permutation(missing).tolist():
                self._found[number] = count(number)
                now = time.monotonic()
                if now - reported > _REPORT_EVERY:
                    left = sum(one not in self._found for one in numbers)
                    log.info("data: counting the sequences of %d blocks, %d are left", len(numbers), left)
                    reported = now
                if now - saved > _SAVE_EVERY:
                    saved = now
                    self._save()
                    break
        self._save()

    def refresh(self) -> None:
        """Read the counts that other processes have written since the last call."""
        for folder in self._folders:
            path = self._file(folder)
            try:
                status = path.stat()
            except OSError:
                continue
            if self._seen.get(path) != (status.st_ino, status.st_mtime_ns):
                self._seen[path] = (status.st_ino, status.st_mtime_ns)
                self._read(path)

    def _file(self, folder: Path) -> Path:
        return folder / f"counts-{self._key}-0.npy"

    def _read(self, path: Path) -> None:
        try:
            content = read_array(path)
        except (OSError, ValueError, EOFError) as error:
            log.warning("data: counts of blocks in %s cannot be read and are found again: %s", path, error)
            return
        whole = content.dtype == np.int64 and content.ndim == 1 and len(content) > 0
        if not whole or content[0] != zlib.crc32(content[1:].data):
            log.warning("data: counts of blocks in %s are damaged and are found again", path)
            return
        known = np.flatnonzero(content[1:] != _UNKNOWN)
        self._found |= dict(zip(known.tolist(), content[1:][known].tolist(), strict=True))
        self._kept[path] = frozenset(known.tolist())

    def _save(self) -> None:
        """Write all counts, unless the file has them already or no folder is writable."""
        for folder in self._folders:
            if not _writable(folder):
                continue
            with locked(folder, f"counts-{self._key}") as writable:
                if not writable:
                    continue
                self.refresh()
                if self._kept.get(self._file(folder), frozenset()).issuperset(self._found):
                    return  # other processes have written them
                table = np.full(max(self._found, default=-1) + 1, _UNKNOWN, np.int64)
                table[list(self._found)] = list(self._found.values())
                write_array(self._file(folder), np.concatenate([[zlib.crc32(table.data)], table]))
            return


def _writable(folder: Path) -> bool:
    """Whether files can be written there, or the folder can be made. Logs no warning if not."""
    if folder.is_dir():
        return os.access(folder, os.W_OK)
    return folder.parent.is_dir() and os.access(folder.parent, os.W_OK)
