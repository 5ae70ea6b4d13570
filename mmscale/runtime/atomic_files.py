"""Replaces files and folders atomically: they are written under a temporary name, synced to disk and renamed.

A reader sees the old content or the new one, also if the writer is killed, the disk is full or the power fails. This is
the only place that renames a temporary file, but for checkpoints (checkpoint/publish.py, checkpoint/layout.py) and the
lease (resilience/run_lock.py), whose names are part of their protocols. No torch.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".tmp"  # suffix of every temporary name


def write_atomic(file: Path, content: bytes | str, *, mode: int = 0o666, durable: bool = True) -> None:
    """Replace a file's content.

    Args:
        file: in a folder that exists.
        content: text is written as UTF-8.
        mode: permissions, less the umask.
        durable: sync file and folder to disk. False: for files that lose their meaning with the machine, e.g. progress
            that is written at every step. After a power failure such a file may be empty.

    Raises:
        OSError: it cannot be written. The old content is unchanged, and no temporary file is left.
    """
    with open_atomic(file, mode=mode, durable=durable) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def open_atomic(file: Path, *, mode: int = 0o666, durable: bool = True) -> Iterator[BinaryIO]:
    """A stream whose content replaces a file at the end of the context, unless it ends with an exception.

    Args:
        file: as for `write_atomic`.
        mode: as for `write_atomic`.
        durable: as for `write_atomic`.

    Raises:
        OSError: as for `write_atomic`.
    """
    temporary = temporary_for(file)
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
        with os.fdopen(descriptor, "w+b") as stream:
            yield stream
            if durable:
                sync(stream)
        publish([(temporary, file)], durable=durable)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder that gets its name, with all files on disk, at the end of the context, unless it ends with an exception.

    Args:
        folder: does not exist, or is empty.

    Raises:
        OSError: it cannot be written, or is not empty. Nothing is left.
    """
    temporary = temporary_for(folder)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            fsync(path)
        publish([(temporary, folder)])
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def temporary_for(path: Path) -> Path:
    """A unique hidden name next to a path, so that processes that write the same file do not mix their bytes."""
    unique = f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
    return path.with_name(f".{path.name}.{unique}{TEMPORARY}")


def publish(renames: Sequence[tuple[Path, Path]], *, durable: bool = True) -> None:
    """Give files that are on disk their final names.

    Args:
        renames: temporary and final path of each.
        durable: sync the folders too.
    """
    for temporary, file in renames:
        temporary.replace(file)
    if durable:
        for folder in {file.parent for _, file in renames}:
            fsync(folder)


def sync(stream: BinaryIO) -> None:
    """Flush an open file to disk."""
    stream.flush()
    os.fsync(stream.fileno())


def fsync(path: Path) -> None:
    """Flush a closed file or a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
