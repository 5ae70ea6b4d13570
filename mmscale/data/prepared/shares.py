"""Preparing a data set by several processes that share a folder: each makes some of the parts.

One process lists the documents and makes the tokenizers (`prepare.plan_shares`), each share makes its parts, and
`prepare` finishes: it makes missing parts and writes the manifest. Without a manifest the data set cannot be loaded, so
a share may be killed at any moment. A share that starts late, after the data set was finished or replaced, does
nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mmscale import bounded
from mmscale.data.modalities.table import register
from mmscale.data.prepared.build import WorkSetup, build_parts
from mmscale.data.prepared.folder import PLAN, read_source
from mmscale.data.prepared.folder_lock import LOCK
from mmscale.data.prepared.manifest import MANIFEST
from mmscale.data.prepared.parts import DONE, PartJob, read_finished
from mmscale.errors import DataError
from mmscale.runtime.atomic_files import write_atomic

# From the plan to the numbers of its jobs: two calls of sbatch. The process that submits them may have been killed.
_SUBMITTED_WITHIN_S = 600.0


@dataclass(frozen=True)
class Share:
    """Some parts of a data set; calling it makes those that are missing.

    Attributes:
        setup: inputs of the workers.
        jobs: the parts.
        workers: processes.
        source: digest of the data set's inputs, as in source.json.
        number: of the share, which chooses its GPU if several shares run on one machine.
    """

    setup: WorkSetup
    jobs: tuple[PartJob, ...]
    workers: int
    source: str
    number: int = 0

    def __call__(self) -> None:
        """Make the parts, unless the folder was finished or now belongs to another data set.

        Raises:
            DataError: one cannot be made. Parts that were finished before are kept.
        """
        for modality in self.setup.modalities:  # a new process has registered the built-in ones only
            register(modality)
        with _shared(self.setup.folder) as there:
            if why := self._too_late() if there else "is gone":
                sys.stderr.write(f"data: {self.setup.folder} {why}; this task makes no parts of it\n")
                return
            missing = [job for job in self.jobs if read_finished(self.setup.folder, job) is None]
            build_parts(self.setup, missing, workers=self.workers, advance=lambda _: None, first=self.number)

    def _too_late(self) -> str:
        """Why the parts are not needed any more; "": they are. The folder must be locked."""
        now = read_source(self.setup.folder)
        if now is None or now.get("digest") != self.source:
            return "is made from something else by now"
        return "is finished" if (self.setup.folder / MANIFEST).exists() else ""


def shares_of(setup: WorkSetup, jobs: Sequence[PartJob], *, source: str, number: int, workers: int) -> list[Share]:
    """Divide the parts into shares, every n-th part to each; empty without parts.

    Args:
        setup: what every share needs to make parts.
        jobs: the parts that are missing.
        source: identifies the documents and settings.
        number: of shares; fewer if there are fewer parts.
        workers: processes of each share.
    """
    return [Share(setup, tuple(jobs[first::number]), workers, source, first) for first in range(min(number, len(jobs)))]


def rest_of(shares: Sequence[Share]) -> Share:
    """One share that makes what those before it have left undone: a task may have been killed."""
    return replace(shares[0], jobs=tuple(job for share in shares for job in share.jobs), number=0)


def require_whole(folder: Path) -> None:
    """Refuse to finish a data set of which parts are missing, which its jobs make on GPUs.

    Raises:
        DataError: parts are missing.
    """
    planned, done = read_plan(folder), len(list((folder / DONE).glob("*.json")))
    if planned is not None and done < planned.parts:
        raise DataError(
            f"data: {planned.parts - done} of {planned.parts} parts of {folder} are missing, and this job has no GPU "
            "to make them with",
            remedy="run the same `mmscale data prepare` again: finished parts are kept",
        )


@contextlib.contextmanager
def _shared(folder: Path) -> Iterator[bool]:
    """Lock the folder together with other shares, so that no process prepares or removes it.

    Yields whether it exists.
    """
    with contextlib.ExitStack() as held:
        try:
            lock = held.enter_context((folder / LOCK).open("r"))
        except FileNotFoundError:
            yield False
            return
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_SH)
        yield True


@dataclass(frozen=True)
class SharedPlan:
    """The plan of several processes that prepare a data set, from which the progress is computed.

    Attributes:
        parts: that the data set will have.
        jobs: that make them, the last one finishes; none if they are not submitted (yet).
        refused: why they could not be submitted; "" if nothing is known.
    """

    parts: int
    jobs: tuple[str, ...] = ()
    refused: str = ""

    def write(self, folder: Path) -> None:
        """Write it into the data set's folder."""
        write_atomic(folder / PLAN, json.dumps(asdict(self)).encode())


def read_plan(folder: Path) -> SharedPlan | None:
    """The plan of several processes in a folder; None: there is none, or its file is damaged."""
    try:
        return bounded.read_record(SharedPlan, folder / PLAN)
    except (OSError, *bounded.BAD_CONTENT):
        return None


def preparation_status(folder: Path) -> dict[str, Any] | None:
    """State of a data set that several processes make, from its files; None: the folder is not such a data set.

    Returns:
        `folder`, `state` (submitting, preparing, failed, prepared), `reason` of a failure, `parts`, `done` and `jobs`.
    """
    planned = read_plan(folder)
    if planned is None:
        return None
    state, reason = _state(folder, planned)
    done = len(list((folder / DONE).glob("*.json")))
    return {
        "folder": str(folder),
        "state": state,
        "reason": reason,
        "parts": planned.parts,
        "done": done,
        "jobs": list(planned.jobs),
    }


def _state(folder: Path, planned: SharedPlan) -> tuple[str, str]:
    """State by the files of a set, and the reason of a failure."""
    if (folder / MANIFEST).is_file():
        return "prepared", ""
    if planned.jobs:
        return "preparing", ""
    return state_without_jobs(folder / PLAN, refused=planned.refused, command="mmscale data prepare")


def state_without_jobs(record: Path, *, refused: str, command: str) -> tuple[str, str]:
    """State of work whose jobs are not known: submitting, or failed with the reason.

    Args:
        record: the file that was written before jobs are submitted.
        refused: why SLURM took no job; "": it did not refuse.
        command: that submits them again.
    """
    if refused:
        return "failed", f"{refused}; run `{command}` again"
    try:
        age_s = time.time() - record.stat().st_mtime
    except OSError:  # it is being replaced
        age_s = 0.0
    if age_s < _SUBMITTED_WITHIN_S:
        return "submitting", ""
    return "failed", f"no job was submitted: run `{command}` again"
