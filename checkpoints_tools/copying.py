"""Copies checkpoints into another form: to an archive, from an archive, and into another number of files.

Values never change here; average.py computes new ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoints_tools.refusals import check_archive, check_copy, check_restore
from checkpoints_tools.sources import open_source, summary
from mmscale.checkpoint import archive as archives
from mmscale.checkpoint import rewrite
from mmscale.checkpoint.archive import ArchiveTensors
from mmscale.checkpoint.tensors import TensorSource, origin_of
from mmscale.runtime.environment import code_version


def archive(run: Path, step: int | None, out: Path, *, weights: bool = False) -> dict[str, Any]:
    """Write a checkpoint as a zarr archive.

    Args:
        run: the run's folder.
        step: the checkpoint; None: the newest.
        out: the archive, a folder that does not exist yet.
        weights: omit the optimizer's state.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, `out` exists or cannot be written.
    """
    check_archive(run, step, out)
    source = open_source(run, step)
    archives.write(source, out, weights=weights, code_version=code_version())
    return summary(out)


def restore(path: Path, run: Path) -> dict[str, Any]:
    """Make an archive the checkpoint of a run, from which any layout can train.

    Args:
        path: the archive.
        run: the run's folder, new or without checkpoints.

    Raises:
        CheckpointError: the archive is missing or damaged, the run has checkpoints or cannot be written.
    """
    check_restore(path, run)
    source = ArchiveTensors(path)
    origin = origin_of("restore", [source])
    return summary(rewrite.into_run(source, run, origin=origin, code_version=code_version()))


def reshard(
    run: Path,
    step: int | None,
    out: Path,
    *,
    weights: bool = False,
    files: int | None = None,
) -> dict[str, Any]:
    """Write a checkpoint again, into other files: the pieces of many ranks become few files with whole tensors.

    Every layout can load every checkpoint unchanged. Resharding is for copying, for file systems with a limited number
    of files, and to omit the optimizer's state.

    Args:
        run: the run's folder, or an archive.
        step: the checkpoint; None: the newest.
        out: the folder of the new run.
        weights: omit the optimizer's state.
        files: number of files with tensors; None: one for every GiB.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, `out` has checkpoints or cannot be written.
    """
    check_copy(run, step, out)
    source: TensorSource = open_source(run, step)
    made = rewrite.into_run(
        source,
        out,
        origin=origin_of("reshard", [source], weights=weights),
        weights=weights,
        files=files,
        code_version=code_version(),
    )
    return summary(made)
