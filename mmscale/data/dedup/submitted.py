"""The jobs that deduplicate a data set, recorded inside it for `mmscale status`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmscale import bounded
from mmscale.data.prepared.shares import state_without_jobs
from mmscale.runtime.atomic_files import write_atomic

FOLDER = ".cache/dedup"  # inside the data set
FILE = f"{FOLDER}/submitted.json"


@dataclass(frozen=True)
class SubmittedDedup:
    """A deduplication by jobs.

    Attributes:
        scratch: folder of its temporary files, which the last job removes when it succeeds.
        logs: folder of the jobs' logs.
        slices: pieces of the first pass.
        jobs: numbers of the jobs, the last one finishes; none if they are not submitted (yet).
        refused: why they could not be submitted; "" if nothing is known.
    """

    scratch: str
    logs: str
    slices: int
    jobs: tuple[str, ...] = ()
    refused: str = ""

    def write(self, folder: Path) -> None:
        """Write it into the data set's folder."""
        (folder / FILE).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / FILE, json.dumps(asdict(self)).encode())


def read_submitted(folder: Path) -> SubmittedDedup | None:
    """The record in a data set's folder; None: there is none, or its file is damaged."""
    try:
        return bounded.read_record(SubmittedDedup, folder / FILE)
    except (OSError, *bounded.BAD_CONTENT):
        return None


def forget_finished(folder: Path) -> None:
    """Remove the record of jobs that have finished, because their weights were removed."""
    found = read_submitted(folder)
    if found is not None and not Path(found.scratch).is_dir():
        (folder / FILE).unlink(missing_ok=True)


def dedup_status(folder: Path) -> dict[str, Any] | None:
    """State of the jobs that deduplicate a data set, from their files; None: there is no such record.

    Returns:
        `folder`, `state` (submitting, deduplicating, failed, deduplicated), `reason` of a failure, `slices`, `read` (of
        them), `compared` (ranges of keys), `jobs` and `logs`.
    """
    found = read_submitted(folder)
    if found is None:
        return None
    scratch = Path(found.scratch)
    state, reason = _state(folder, found)
    done = state == "deduplicated"
    return {
        "folder": str(folder),
        "state": state,
        "reason": reason,
        "slices": found.slices,
        "read": found.slices if done else len(list(scratch.glob("run-*.npy"))),
        "compared": len(list(scratch.glob("pairs-*.npy"))),
        "jobs": list(found.jobs),
        "logs": found.logs,
    }


def _state(folder: Path, found: SubmittedDedup) -> tuple[str, str]:
    """State by the files, and the reason of a failure."""
    if not Path(found.scratch).is_dir():
        return "deduplicated", ""
    if found.jobs:
        return "deduplicating", ""
    return state_without_jobs(folder / FILE, refused=found.refused, command="mmscale data dedup")
