"""Files of packing indices and counts: written atomically, by one of several processes, and never required.

A cache that is lost, damaged or cannot be written costs time but never changes the order.
"""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmscale.config import Config
from mmscale.runtime.atomic_files import TEMPORARY, open_atomic

log = logging.getLogger(__name__)


def fallback_cache(config: Config) -> Path:
    """Folder in the run for indices, used if they cannot be written next to the data."""
    return Path(config.run.dir) / config.run.name / ".cache"


def write_array(path: Path, array: NDArray[np.int64]) -> None:
    """Write atomically; a full disk or a folder without write permission is not an error."""
    try:
        with open_atomic(path) as file:
            np.save(file, array, allow_pickle=False)
    except OSError as error:
        log.warning("data: packing index %s cannot be written, it stays in memory: %s", path, error)


@contextmanager
def locked(folder: Path, name: str) -> Iterator[bool]:
    """Hold the lock for files of this name, and remove temporary files of killed writers. Yields whether it can write.

    The lock only saves work: without one (some network file systems) every process packs for itself. All get the same
    bytes and files are written atomically, so the last writer does no harm.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / f"{name}.lock").open("a")
    except OSError as error:
        log.warning("data: no packing cache in %s, indices stay in memory: %s", folder, error)
        yield False
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            for stale in folder.glob(f"*{name}-*{TEMPORARY}"):  # left by a process that was killed
                stale.unlink(missing_ok=True)
        except OSError as error:
            log.warning("data: %s cannot be locked: %s", file.name, error)
        yield True
