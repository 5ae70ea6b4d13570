"""Disks that can become full, read-only and frozen, and recover: a tmpfs, and an ext4 in a file."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

KINDS = ("full", "read-only", "frozen")


class Disk:
    """A mounted file system.

    Args:
        folder: where it is mounted.
        kind: of KINDS: the failure that `refuse` causes.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self.kind = kind
        self.refused = self.good = 0.0  # times

    def refuse(self) -> None:
        """Make it refuse every write from now on, or hang in it."""
        if self.kind == "full":
            with contextlib.suppress(OSError), (self.folder / "filler").open("wb", buffering=0) as file:
                for size in (1 << 16, 1 << 12, 1):
                    with contextlib.suppress(OSError):
                        while file.write(b"x" * size) == size:
                            pass
        elif self.kind == "read-only":
            self._remount("ro")
        else:
            _run("fsfreeze", "-f", str(self.folder))
        self.refused = time.time()

    def recover(self) -> None:
        """Make it accept writes again."""
        self.good = time.time()
        if self.kind == "full":
            (self.folder / "filler").unlink()
        elif self.kind == "read-only":
            self._remount("rw")
        else:
            _run("fsfreeze", "-u", str(self.folder))

    def _remount(self, mode: str) -> None:
        """Remount; fails while any file is open for writing."""
        deadline = time.monotonic() + 60
        while subprocess.run(["mount", "-o", f"remount,{mode}", str(self.folder)], capture_output=True).returncode:
            assert time.monotonic() < deadline, "a file stays open for writing"
            time.sleep(0.001)


@contextlib.contextmanager
def disk_of(folder: Path, kind: str) -> Iterator[Disk]:
    """A disk of 64 MB. Skips the test where mounts are not permitted."""
    folder.mkdir()
    if kind == "frozen":
        if any(shutil.which(tool) is None for tool in ("fsfreeze", "mkfs.ext4")):
            pytest.skip("there is no fsfreeze or no mkfs.ext4")
        image = folder.with_suffix(".img")
        with image.open("wb") as file:
            file.truncate(64 << 20)
        _run("mkfs.ext4", "-q", str(image))
        command = ["mount", "-o", "loop", str(image), str(folder)]
    else:
        command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no mount: {mounted.stderr.strip()}")
    disk = Disk(folder, kind)
    try:
        yield disk
    finally:
        if disk.refused > disk.good:
            disk.recover()
        _run("umount", "-l", str(folder))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
