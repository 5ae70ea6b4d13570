"""The owner of a run, and the refusal of a second one.

A run's lease names its owner; SLURM, the owner's process or the lease's counter show whether the owner is alive.
`refuse_busy` is called before a job is queued (submit.py, control.py), and again by the job itself (job.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import chain
from launch import record as records
from launch.job_table import JobTable
from mmscale.errors import LaunchError, shell_command
from mmscale.resilience import lease, run_lock
from mmscale.runs.events import BEGINS, ORDERLY_ENDS, read_events


def refuse_busy(run: Path, *, job: str | None = None) -> frozenset[str]:
    """Refuse a second job for a run.

    Args:
        run: its folder.
        job: the job that asks, "" without SLURM: it may own the run already, since an earlier start. None: there is no
            job yet, and then all jobs of the run's launches count, including waiting ones.

    Returns:
        Ids of attempts that have ended according to SLURM: `RunLock.take` need not watch their holders.

    Raises:
        UnreachableError: SLURM does not answer.
        LaunchError: another job trains the run, or waits to.
    """
    owner = lease.owner(run)
    if owner is not None and not owner.job:
        run_lock.refuse_held(run)
    over: frozenset[str] = frozenset()
    for link in _links(run, owner, job):
        if link.alive and link.state is not None:
            raise LaunchError(
                f"{run} belongs to job {link.key.id}, which is {link.state.state}",
                remedy=f"{shell_command('stop', run)} ends it; --after {link.key.id} starts after it",
            )
        if link.elsewhere and owner is not None and owner.job == link.key.id:
            raise LaunchError(
                f"{run} belongs to job {owner.job} by its {lease.LEASE}, and this machine cannot find out whether that "
                f"runs: {link.note}",
                remedy=f"{shell_command('stop', run)} there; if nothing runs any more, remove {run / lease.LEASE}",
            )
        if owner is not None and link.key.id == owner.job and link.state is not None and link.folder != run:
            over = frozenset({owner.id})
    if owner is not None and owner.job:
        run_lock.refuse_held(run, job=job or "", known_dead=over)
    return over


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


def of(run: Path) -> lease.Lease | None:
    """The owner of a run; None also if the lease is damaged, so that the run's jobs are still shown."""
    try:
        return lease.owner(run)
    except LaunchError:
        return None


def is_held(run: Path, held: lease.Lease) -> bool:
    """Whether the holder is alive: by its process, or, if that is not visible, by the time of its last heartbeat."""
    lives = run_lock.holder_lives(run, held)
    return held.is_of(run) and time.time() - lease.changed(run) < lease.ORPHANED_S if lives is None else lives


def has_begun(events: Sequence[dict[str, Any]], held: lease.Lease) -> bool:
    """Whether the attempt of a run's owner has begun to train, by the run's events."""
    return any(event["event"] in BEGINS and event.get("attempt") == held.attempt for event in events)


def job_is_starting(events: Sequence[dict[str, Any]], job: str) -> bool:
    """Whether a running job checks its nodes or its ranks load, by the run's events: its last attempt has not begun."""
    launched = [event for event in events if event["event"] == "launch" and str(event.get("job")) == job]
    if not launched:
        return True
    of_last = {event["event"] for event in events if event.get("attempt") == launched[-1].get("attempt")}
    return not of_last & {*BEGINS, *ORDERLY_ENDS, "ranks_ended", "gave_up"}


def starting(run: Path) -> lease.Lease | None:
    """The owner of a run, alive, whose ranks load or wait for each other; None: there is none."""
    held = of(run)
    return None if held is None or has_begun(read_events(run), held) or not is_held(run, held) else held
