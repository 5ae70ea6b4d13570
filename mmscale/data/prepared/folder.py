"""The folder of a data set while it is prepared: locking, the record of its source, and what may be removed in it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmscale import bounded
from mmscale.data import digests
from mmscale.data.modalities import text_tokens
from mmscale.data.modalities.table import MODALITIES, folder_of
from mmscale.data.prepared import canaries, neighbours, selection, tasks
from mmscale.data.prepared.folder_lock import LOCK
from mmscale.data.prepared.manifest import MANIFEST, MOST_BYTES
from mmscale.data.prepared.parts import DONE, SPLITS
from mmscale.errors import DataError
from mmscale.runtime.atomic_files import TEMPORARY, write_atomic

SOURCE = "source.json"
REJECTED = "rejected.jsonl"
JOBS = "jobs"  # folder with logs of the jobs that made the parts
PLAN = "plan.json"  # plan of the processes that share the parts

# Their files are written one by one.
_WRITTEN = (*SPLITS, DONE, tasks.FOLDER, text_tokens.FOLDER, selection.FOLDER, selection.SCORES, neighbours.FOLDER)


def tokenizer_folders() -> tuple[str, ...]:
    """Folders of tokenizers."""
    return text_tokens.FOLDER, *map(folder_of, MODALITIES)


def _own() -> tuple[str, ...]:
    """Names that a data set's folder may contain, in the order in which --overwrite removes them: manifest first."""
    return (
        MANIFEST,
        digests.DIGESTS,
        REJECTED,
        canaries.FILE,
        *SPLITS,
        DONE,
        tasks.FOLDER,
        *tokenizer_folders(),
        selection.FOLDER,
        selection.SCORES,
        neighbours.FOLDER,
        ".cache",
        PLAN,
        JOBS,
        SOURCE,
    )


@contextlib.contextmanager
def claimed(out: Path, source: dict[str, Any], *, overwrite: bool) -> Iterator[None]:
    """Lock the folder of a data set, after checking that it may be written to; temporary files are removed at the end.

    Args:
        out: the folder; made if it is missing.
        source: documents and settings of the data set.
        overwrite: whether a data set of another source may be replaced.

    Raises:
        DataError: it is no folder, holds something else, is being prepared by another process, or has another source.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"data: {out} is not a folder", remedy="choose another --out")
    foreign = _foreign(out)
    if foreign:
        raise DataError(f"data: {out} holds something else than a data set ({foreign})", remedy="choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("w") as lock:  # the lock is released when the process ends, however it ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"data: another process is preparing {out}", remedy="wait for it or stop it") from error
        except OSError:  # a file system without locks
            pass
        _begin(out, source, overwrite=overwrite)
        try:
            yield
        finally:
            _remove_temporary(out)


def _foreign(out: Path) -> str:
    """A file that no data set contains, if the folder is not that of a data set in preparation."""
    if not out.is_dir() or (out / SOURCE).exists():
        return ""
    names = {LOCK, *_own()}
    begun = tuple(f"{hidden}{name}." for name in _own() for hidden in (".", ""))  # "": of older versions
    found = (entry.name for entry in sorted(out.iterdir()) if entry.name not in names)
    return next((name for name in found if not (name.startswith(begun) and name.endswith(TEMPORARY))), "")


def _begin(out: Path, source: dict[str, Any], *, overwrite: bool) -> None:
    file = out / SOURCE
    before = read_source(out)
    if before == source and not overwrite:
        _remove_temporary(out)
        return
    leftovers = [name for name in _own() if (out / name).exists()]
    if leftovers and not overwrite:
        what = ", ".join(_differences(before, source)) if before else "it does not say from what"
        raise DataError(
            f"data: {out} was prepared from something else ({what})",
            remedy="remove it, choose another --out, or give --overwrite",
        )
    for name in leftovers:
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    _remove_temporary(out)
    write_atomic(file, (json.dumps(source, indent=1) + "\n").encode())


def read_source(out: Path) -> dict[str, Any] | None:
    """The record of the source of a folder's data set; None: there is none."""
    try:
        return bounded.read_object(out / SOURCE, most=MOST_BYTES)
    except (OSError, ValueError):
        return None


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the differing entries."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new and key != "digest":
            found.append(prefix + key)
    return found


def _remove_temporary(out: Path) -> None:
    """Remove temporary files of an interrupted run; only in the data set's own folders."""
    for pattern in (
        f"*{TEMPORARY}",
        *(f"{name}/*{TEMPORARY}" for name in _WRITTEN),
    ):
        for path in out.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
