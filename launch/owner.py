# Whether somebody trains a run already: its lease says who does, SLURM whether that job still runs. Asked before a job
# queues (submit.py, control.py), and once more by the job itself (job.py).
"""One run has one owner."""

from __future__ import annotations

import os
from pathlib import Path

from launch import chain
from launch import record as records
from launch.job_table import JobTable
from mmscale.errors import LaunchError
from mmscale.resilience import lease


def refuse_busy(run: Path, *, job: str | None = None) -> None:
    """Two jobs must not train one run.

    Args:
        run: its folder.
        job: the one that asks, "" without SLURM: it may own the run already, since an earlier start. None: there is
            none yet, and then all jobs of its launches count too, which may only wait to begin.

    Raises:
        UnreachableError: SLURM does not answer.
        LaunchError: another one trains it, or waits to.
    """
    owner = lease.owner(run)
    if owner is not None and not owner.job and owner.host == os.uname().nodename and _lives(owner.pid):
        raise LaunchError(
            f"{run} is being trained by process {owner.pid}", remedy=f"`mmscale stop {run}` has it save and end"
        )
    for link in _links(run, owner, job):
        if link.alive and link.state is not None:
            raise LaunchError(
                f"{run} belongs to job {link.key.id}, which is {link.state.state}",
                remedy=f"`mmscale stop {run}` ends it; --after {link.key.id} goes on after it",
            )
        if link.elsewhere and owner is not None and owner.job == link.key.id:
            raise LaunchError(
                f"{run} belongs to job {owner.job} by its {lease.LEASE}, and nobody here can tell whether that runs: "
                f"{link.note}",
                remedy=f"`mmscale stop {run}` there; if nothing runs any more, remove {run / lease.LEASE}",
            )


def _links(run: Path, owner: lease.Lease | None, job: str | None) -> list[chain.Link]:
    """Other jobs: the one that holds the lease, and, if no job asks, every one that a launch of this run became."""
    holder = owner.job if owner is not None and owner.job != job else ""
    if job is not None and not holder:
        return []
    table = JobTable()
    found = [link for link in chain.links(run, table) if job is None or link.key.id == holder]
    if holder and all(link.key.id != holder for link in found):
        found.append(chain.Link(run, records.JobKey(holder), table.states([holder]).get(holder)))
    return found


def _lives(pid: int) -> bool:
    """Whether there is such a process on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
