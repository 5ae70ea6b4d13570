"""Checks files and folders that a command line names, before a command loads torch and a model."""

from __future__ import annotations

from pathlib import Path

from mmscale.errors import DataError, UsageError


def existing(file: Path, *, what: str = "file", whose: str = "") -> Path:
    """The file, if it exists.

    Args:
        file: named by the user.
        what: it is, for the remedy.
        whose: beginning of the message.

    Raises:
        DataError: there is no such file.
    """
    if not file.exists():
        raise DataError(f"{whose}{file} cannot be read: there is no such file", remedy=f"name another {what}")
    return file


def check_run(run: Path, step: int | None) -> None:
    """Refuse a run without the checkpoint that a command reads.

    Args:
        run: its folder.
        step: of the checkpoint; None: the newest.

    Raises:
        UsageError: there is no such folder.
        CheckpointError: the run has no checkpoint, or none of this step.
    """
    from mmscale.checkpoint.layout import Store

    if not run.is_dir():
        raise UsageError(f"there is no folder {run}", remedy="name the folder of a run (run.dir/run.name), or an export")
    Store.of_run(run).choose(step)


def check_set(folder: Path | None) -> None:
    """Refuse a folder of `--data` that is no prepared data set; None: the option was not given.

    Raises:
        DataError: it is missing, incomplete or damaged.
    """
    from mmscale.data.prepared.manifest import read_manifest

    if folder is not None:
        read_manifest(folder, setting="--data")
