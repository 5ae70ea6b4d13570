# Used by tests that kill processes. Other tests may use /dev/shm at the same time.
"""Finds what ended processes have left in shared memory, on a machine whose shared memory others use too."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

ROOT = Path("/dev/shm")
PATIENCE_S = 300.0
# Semaphores of multiprocessing's pools, which their own processes remove. Ranks use no pools.
POOLS = "sem."


def entries() -> set[str]:
    """Names of this user's entries."""
    found = set()
    for entry in ROOT.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if entry.lstat().st_uid == os.getuid() and not entry.name.startswith(POOLS):
                found.add(entry.name)
    return found


def used() -> set[str]:
    """Names of entries that a living process has mapped or in which it has opened a file."""
    places: list[str] = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                places += [line.split(maxsplit=5)[-1] for line in (process / "maps").read_text().splitlines()]
            with contextlib.suppress(OSError):
                for link in (process / "fd").iterdir():
                    with contextlib.suppress(OSError):
                        places.append(str(link.readlink()))
    start = f"{ROOT}/"
    return {place.removeprefix(start).split("/")[0] for place in places if place.startswith(start)}


def left_behind(before: set[str], *, patience_s: float = PATIENCE_S) -> set[str]:
    """Entries that are new since `before`, are used by no living process, and remain; those of others disappear."""
    deadline = time.monotonic() + patience_s
    while (found := entries() - before) and (found := found - used()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found
