"""Sets the modes of files that libraries write through temporary files, which have mode 0600 whatever the umask is."""

from __future__ import annotations

import stat
from pathlib import Path


def apply_umask(*files: Path) -> None:
    """Set the modes of files according to the process's umask.

    Args:
        files: written by this process; a folder means all files below it.
    """
    allowed = 0o666 & ~_umask()
    for file in files:
        for one in file.rglob("*") if file.is_dir() else (file,):
            if one.is_file() and not one.is_symlink():
                one.chmod(stat.S_IMODE(one.stat().st_mode) | allowed)


def _umask() -> int:
    """The process's umask, read from /proc: the system call would change it temporarily for other threads."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o077
