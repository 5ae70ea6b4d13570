"""Opens the checkpoint or archive that a command line names; both have the same interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmscale.checkpoint.archive import ArchiveTensors
from mmscale.checkpoint.layout import is_archive
from mmscale.checkpoint.named import find
from mmscale.checkpoint.tensors import TensorSource, open_tensors


def open_source(path: Path, step: int | None = None) -> TensorSource:
    """The tensors of a checkpoint or an archive.

    Args:
        path: a run's folder or an archive.
        step: a checkpoint of the run; None: the newest.

    Raises:
        CheckpointError: it does not exist, or its names and sizes show damage.
    """
    find(path, step)
    return ArchiveTensors(path) if is_archive(path) else open_tensors(path, step)


def summary(made: Path) -> dict[str, Any]:
    """A summary of a written checkpoint: path, step, files, bytes, content and origin."""
    archive = is_archive(made) and "step_" not in made.name
    source: TensorSource = ArchiveTensors(made) if archive else open_tensors(made.parent.parent, int(made.name[5:]))
    manifest, names = source.manifest(), source.names()
    return {
        "path": str(made),
        "step": source.step,
        "contents": source.info().get("contents", "training"),
        "tensors": len(names),
        "files": len(manifest.files),
        "bytes": sum(record.size for record in manifest.files.values()),
        "origin": manifest.origin,
    }
