"""The chain of jobs of a run.

The jobs of a run: those of each launch folder. Several may be alive if they were chained, by `chain` of the profile or
by --after. A job is identified by more than its number, because numbers are reused and clusters share file systems.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import record as records
from launch import scheduler
from launch.job_states import Phase
from launch.job_table import JobTable
from launch.record import JobKey
from launch.scheduler import JobState

# If several jobs are alive, the run's state is that of the job closest to training.
_ORDER = (Phase.RUNNING, Phase.PAUSED, Phase.ENDING, Phase.WAITING)


@dataclass(frozen=True)
class Link:
    """One job of a run.

    Attributes:
        folder: its launch folder.
        key: its identity.
        state: SLURM's state; None if SLURM does not know the job (any more).
        elsewhere: the job belongs to another cluster, so this machine cannot find out whether it is alive.
        note: why there is no state, for a message; "" if SLURM has forgotten the job.
    """

    folder: Path
    key: JobKey
    state: JobState | None = None
    elsewhere: bool = False
    note: str = ""

    @property
    def alive(self) -> bool:
        """Whether the job runs, waits, or is being ended."""
        return self.state is not None and not self.state.ended


def keys(run: Path) -> list[tuple[Path, JobKey]]:
    """Jobs of a run with their launch folders, in the order of submission."""
    folders = [entry for entry in (run / records.FOLDER).glob("[0-9]*") if entry.name.isdigit()]
    folders.sort(key=lambda entry: int(entry.name))
    return [(folder, key) for folder in folders for key in records.keys_of(folder)]


def links(run: Path, table: JobTable) -> list[Link]:
    """All jobs of a run with SLURM's states, in the order of submission.

    Raises:
        UnreachableError: SLURM does not answer.
    """
    return links_of([run], table)[run]


def links_of(runs: Sequence[Path], table: JobTable) -> dict[Path, list[Link]]:
    """The same for several runs, with one query for all.

    Raises:
        UnreachableError: SLURM does not answer.
    """
    known = {run: keys(run) for run in runs}
    every = [key for found in known.values() for _, key in found]
    here = scheduler.cluster_name() if any(key.cluster for key in every) else ""
    states = table.states(key.id for key in every if key.cluster in ("", here))
    return {
        run: [_link(folder, key, states.get(key.id), here) for folder, key in found] for run, found in known.items()
    }


def _link(folder: Path, key: JobKey, state: JobState | None, here: str) -> Link:
    if key.cluster not in ("", here):
        note = f"job {key.id} is of cluster {key.cluster}, and this machine asks {here}"
        return Link(folder, key, elsewhere=True, note=note)
    if state is not None and not key.is_job(state):
        note = f"number {key.id} is another job's now: {state.name}, submitted {state.submitted}"
        return Link(folder, key, note=note)
    return Link(folder, key, state)


def last(found: Sequence[Link], jobs: Sequence[str]) -> Link:
    """The job whose state shows how a run without live jobs ended: the last started job of the newest launch.

    Jobs behind it were cancelled when the run was over.

    Args:
        found: all jobs of the run.
        jobs: numbers of started jobs, in that order, from the run's events.
    """
    newest = [link for link in found if link.folder == found[-1].folder]
    started = {link.key.id: link for link in newest}
    return next((started[job] for job in reversed(jobs) if job in started), newest[-1])


def alive(found: Iterable[Link]) -> list[Link]:
    """Jobs that have not ended, the one closest to training first."""
    living = [link for link in found if link.alive]
    return sorted(living, key=lambda link: _ORDER.index(link.state.phase) if link.state is not None else len(_ORDER))
