# Whether somebody trains a run already: its lease says who does, SLURM whether that job still runs. Asked before a job
# queues (submit.py, control.py), and once more by the job itself (job.py).
"""One run has one owner."""

from __future__ import annotations

import os
from pathlib import Path

from launch import record as records
from launch import scheduler
from mmscale.errors import LaunchError
from mmscale.resilience import lease


def refuse_busy(run: Path, *, job: str | None = None) -> None:
    """Two jobs must not train one run.

    Args:
        run: its folder.
        job: the one that asks, "" without SLURM: it may own the run already, since an earlier start. None: there is
            none yet, and then the job of the newest launch counts too, which may only wait to begin.

    Raises:
        LaunchError: another one trains it, or waits to.
    """
    owner = lease.owner(run)
    names = {owner.job} if owner is not None else set()
    if job is None:
        newest = records.latest(run)
        names.add((records.job_of(newest) if newest is not None else None) or "")
    if owner is not None and not owner.job and owner.host == os.uname().nodename and _lives(owner.pid):
        raise LaunchError(
            f"{run} is being trained by process {owner.pid}", remedy=f"`mmscale stop {run}` has it save and end"
        )
    for name in sorted(names - {"", job}):
        state = scheduler.job_state(name)
        if state is not None and not state.ended:
            raise LaunchError(
                f"{run} belongs to job {name}, which is {state.state}",
                remedy=f"`mmscale stop {run}` ends it; --after {name} goes on after it",
            )


def _lives(pid: int) -> bool:
    """Whether there is such a process on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
