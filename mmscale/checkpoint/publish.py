"""Atomic folders: written under a temporary name, hashed, synced to disk and renamed.

For stand-alone outputs such as archives and converted models. layout.py commits the checkpoints of runs. No tensors.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from mmscale.checkpoint import integrity
from mmscale.checkpoint.integrity import CheckpointManifest
from mmscale.errors import CheckpointError
from mmscale.runtime import fail_points
from mmscale.runtime.atomic_files import fsync

_LEFT = ".tmp."  # between the final name and a random part


@contextlib.contextmanager
def folder(final: Path) -> Iterator[Path]:
    """A new folder next to `final` to write into; `commit` gives it that name. Without a commit it is removed.

    Leftovers of killed processes next to `final` are deleted first, but not folders of processes that are still
    writing.

    Args:
        final: a name that does not exist yet.

    Raises:
        CheckpointError: the name exists, or nothing can be written there.
    """
    refuse_existing(final)
    with writing(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        for left in final.parent.glob(f"{_escaped(final.name)}{_LEFT}*"):
            _sweep(left)
        temporary = final.with_name(f"{final.name}{_LEFT}{uuid.uuid4().hex[:12]}")
        temporary.mkdir(mode=0o755)
        handle = os.open(temporary, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # a file system without locks, where leftovers are not deleted either
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield temporary
        finally:
            os.close(handle)
            shutil.rmtree(temporary, ignore_errors=True)  # after a commit it is no longer there


def commit(
    temporary: Path,
    final: Path,
    manifest: CheckpointManifest,
    *,
    replaced: Path | None = None,
    passed: Callable[[str], None] = fail_points.reached,
) -> None:
    """Give a written folder its final name. If the process is killed before the rename, no new folder has that name.

    Args:
        temporary: the folder, next to `final`.
        final: its name.
        manifest: the files of the folder, as written.
        replaced: name for a folder that has the final name already, which is removed in the end; None: refuse it.
        passed: called with the name of every sub-step after it. An exception there ends the commit.

    Raises:
        CheckpointError: the name is taken.
    """
    _seal(temporary, manifest, passed=passed)
    if replaced is None:
        refuse_existing(final)
    elif final.exists():
        final.replace(replaced)
        passed("move")
    temporary.replace(final)
    fsync(final.parent)
    passed("rename")
    if replaced is not None and replaced.exists():
        shutil.rmtree(replaced)


def _seal(folder: Path, manifest: CheckpointManifest, *, passed: Callable[[str], None]) -> None:
    """Write the manifest of a written folder, remove write permission for others, and sync everything to disk.

    Args:
        folder: still under its temporary name.
        manifest: its files.
        passed: called after "manifest" and "fsync".
    """
    (folder / integrity.MANIFEST).write_text(manifest.text(), encoding="utf-8")
    passed("manifest")
    for path in (*folder.rglob("*"), folder):
        path.chmod(stat.S_IMODE(path.stat().st_mode) & ~stat.S_IWOTH)
        fsync(path)
    passed("fsync")


def refuse_existing(final: Path) -> None:
    """Refuse to overwrite anything.

    Raises:
        CheckpointError: the name exists.
    """
    if final.exists() or final.is_symlink():
        raise CheckpointError(f"{final} exists already", remedy="name a folder that does not exist, or remove this one")


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turns storage errors inside the context into errors with a remedy.

    Raises:
        CheckpointError: nothing (more) can be written.
    """
    try:
        yield
    except (OSError, RuntimeError) as failed:
        # Torch.save raises another error while it handles the OSError.
        error = failed if isinstance(failed, OSError) else failed.__context__
        if not isinstance(error, OSError):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise CheckpointError(
            f"{target} cannot be written: {error.strerror or error}",
            remedy="make room there or choose another place" if full else "choose another place, or check its rights",
        ) from error


def _sweep(left: Path) -> None:
    """Delete a leftover unless its writer is alive; a lock ends with its process."""
    try:
        handle = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(left, ignore_errors=True)
    except OSError:  # held, or a file system without locks
        pass
    finally:
        os.close(handle)


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
