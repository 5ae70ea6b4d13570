"""Writes files atomically, even if the power fails or other processes write the same file; locks folders.

A file is written under a unique temporary name, and renamed once it is on disk. No torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from mmscale.errors import DataError

LOCK = ".lock"  # lock file of a data set's folder
TEMPORARY = ".tmp"  # suffix of every temporary name
_AGAIN = "free some space and run the same command again: finished parts are kept"


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock a data set's folder; waits for its present owner.

    The lock is released when the process ends, however it ends.
    """
    with (folder / LOCK).open("a") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_error(error: OSError, path: Path) -> DataError:
    """The error for the user for a full disk, a quota or missing permissions."""
    return DataError(f"data: {path} could not be written: {error.strerror or error}", remedy=_AGAIN)


def temporary_for(file: Path) -> Path:
    """A unique name next to a file, so that two processes that write the same file do not mix their bytes."""
    return file.with_name(f"{file.name}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}{TEMPORARY}")


def write_whole(file: Path, content: bytes) -> None:
    """Write a file atomically, even if the power fails."""
    temporary = temporary_for(file)
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            sync(stream)
        publish([(temporary, file)])
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def sync(stream: BinaryIO) -> None:
    """Flush a file to disk."""
    stream.flush()
    os.fsync(stream.fileno())


def publish(renames: Sequence[tuple[Path, Path]]) -> None:
    """Give files that are on disk their final names, and flush the folder too."""
    for temporary, file in renames:
        temporary.replace(file)
    for folder in {file.parent for _, file in renames}:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
