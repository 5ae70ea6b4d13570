"""Refers to a folder by its inode as well as by its name, so that a rename is noticed.

Keeps using a folder after it was renamed. On systems other than Linux a rename is not noticed. The caller decides what
to do after a rename.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType

_DESCRIPTORS = Path("/proc/self/fd")


class OpenFolder:
    """An open descriptor of a folder, while it is entered.

    Args:
        path: of the folder, which exists.

    Attributes:
        stable: a path to it that stays valid under any name, in this process and in forked ones.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._file = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        self.stable = _DESCRIPTORS / str(self._file) if _DESCRIPTORS.is_dir() else self.path

    def __enter__(self) -> OpenFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._file)

    def moved(self) -> Path | None:
        """The new path, if the folder was renamed; None if not, if it was deleted, or if the path is unknown."""
        try:
            if self._is_at(self.path):
                return None
        except FileNotFoundError:
            pass
        except OSError:
            return None
        candidates = []
        with contextlib.suppress(OSError):
            candidates.append(self.stable.readlink())
        with contextlib.suppress(OSError):  # renamed from another host, while this one has cached the old name
            candidates += self.path.parent.iterdir()
        for candidate in candidates:
            with contextlib.suppress(OSError):
                if self._is_at(candidate):
                    return candidate
        return None

    def _is_at(self, path: Path) -> bool:
        here, held = path.stat(), os.fstat(self._file)
        return (here.st_dev, here.st_ino) == (held.st_dev, held.st_ino)
