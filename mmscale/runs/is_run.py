"""Tells folders of runs from other folders."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mmscale.errors import UsageError, no_folder
from mmscale.runs.events import EVENTS
from mmscale.runs.metrics import METRICS

# A remedy. The user may have started the run a moment ago, whose checks come first.
NAME_ANOTHER = "name a folder run.dir/run.name, which appears when the run starts; `mmscale status` lists runs/"


def no_run(folder: Path) -> str:
    """Why a folder is none of a run; "": it is one."""
    if any((folder / file).is_file() for file in (METRICS, EVENTS, "config.yaml")):
        return ""
    if not folder.exists():
        return no_folder(folder)
    return f"{folder} has no {METRICS}, {EVENTS} or config.yaml, so it is no run folder"


def check_runs(folders: Iterable[Path]) -> None:
    """Refuse folders that are none of runs.

    Raises:
        UsageError: one is not.
    """
    for folder in folders:
        if cause := no_run(folder):
            raise UsageError(cause, remedy=NAME_ANOTHER)
