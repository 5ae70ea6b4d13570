"""The lock of a data set's folder, and the error when something cannot be written there. No torch."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from mmscale.errors import DataError

LOCK = ".lock"  # lock file of a data set's folder
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
