"""A folder that appears whole or not at all: written under another name, hashed, brought to the disk, renamed.

For what stands alone, such as an archive or a converted model. The checkpoints of a run, layout.py commits. No tensors.
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
from mmscale.checkpoint.integrity import Manifest
from mmscale.errors import CheckpointError

_LEFT = ".tmp."  # between the final name and a random part


def _nothing(stage: str) -> None:
    """The usual `on_stage`."""


@contextlib.contextmanager
def folder(final: Path) -> Iterator[Path]:
    """A new folder beside `final` to write into; `commit` gives it that name. Without a commit nothing of it stays.

    What a killed process left beside `final` is deleted first, and what a living one is writing there is not.

    Args:
        final: a name that nothing has yet.

    Raises:
        CheckpointError: something has that name, or nothing can be written there.
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
            with contextlib.suppress(OSError):  # a file system without locks: then nobody sweeps either
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield temporary
        finally:
            os.close(handle)
            shutil.rmtree(temporary, ignore_errors=True)  # after a commit it is no longer there


def commit(temporary: Path, final: Path, manifest: Manifest, *, on_stage: Callable[[str], None] = _nothing) -> None:
    """Give a written folder its name. Killed before the rename it leaves nothing under that name.

    Args:
        temporary: what `folder` gave.
        final: what `folder` was given.
        manifest: what the folder consists of, hashed after it was written.
        on_stage: told the name of every sub-step after it; tests end the process there.

    Raises:
        CheckpointError: something got that name meanwhile.
    """
    (temporary / integrity.MANIFEST).write_text(manifest.text(), encoding="utf-8")
    on_stage("manifest")
    for path in (*temporary.rglob("*"), temporary):
        path.chmod(stat.S_IMODE(path.stat().st_mode) & ~stat.S_IWOTH)
        integrity.fsync(path)
    on_stage("fsync")
    refuse_existing(final)
    temporary.rename(final)
    integrity.fsync(final.parent)
    on_stage("rename")


def refuse_existing(final: Path) -> None:
    """Nothing is ever written over.

    Raises:
        CheckpointError: something has that name.
    """
    if final.exists() or final.is_symlink():
        raise CheckpointError(f"{final} exists already", remedy="name a folder that does not exist, or remove this one")


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Inside, an error of the storage becomes one that says what to do.

    Raises:
        CheckpointError: nothing (more) can be written.
    """
    try:
        yield
    except (OSError, RuntimeError) as failed:
        error = failed if isinstance(failed, OSError) else failed.__context__  # torch.save hides what stopped it
        if not isinstance(error, OSError):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise CheckpointError(
            f"{target} cannot be written: {error.strerror or error}",
            remedy="make room there or choose another place" if full else "choose another place, or check its rights",
        ) from error


def _sweep(left: Path) -> None:
    """Delete it unless its writer lives; a lock ends with its process."""
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
