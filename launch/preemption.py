# Preemptions with a grace period: slurmctld may requeue the job by itself. allocation.py asks, job.py acts.
"""Tells who has to requeue a preempted job: the job or slurmctld."""

from __future__ import annotations

import re

from launch import scheduler

_REQUEUED_AT_END_SINCE = (24, 5)
_MOST = 5  # SLURM's default of MaxBatchRequeue
_FIELD = re.compile(r"(?:^|\s)([A-Za-z_]+)\s*=[ \t]*(\S*)")


def requeued_at_end(job: str, *, before: int) -> bool:
    """Whether slurmctld requeues a preempted job as soon as its batch script ends.

    SLURM 24.05 and newer mark a job at the beginning of its grace period. When the batch script of a marked job ends,
    slurmctld requeues the job and removes the mark. `scontrol requeue` does not remove it, so the job is requeued once
    more at its next end, even if the run has finished by then (`GRACE_PREEMPT` in src/slurmctld/proc_req.c and
    job_mgr.c). A job that slurmctld requeues should therefore just end.

    slurmctld holds a job after `MaxBatchRequeue` such requeues. The last of them is not used. A job without any left
    requeues itself, at the price of one more start after the end of the run.

    Args:
        job: number of a running job that has been preempted since it started.
        before: how often jobs of its launch have been requeued in this way.

    Returns:
        False also if the preemption mode of the job is not known to be REQUEUE: other modes end it.

    Raises:
        UnreachableError: SLURM does not answer.
        LaunchError: SLURM does not know the job or its partition.
    """
    config = _fields(["show", "config"])
    if _version(config.get("SLURM_VERSION", "")) < _REQUEUED_AT_END_SINCE:
        return False
    if config.get("PreemptType") != "preempt/partition_prio":  # another plug-in's mode need not be the partition's
        return False
    most = config.get("MaxBatchRequeue", "")
    if before + 2 > (int(most) if most.isdigit() else _MOST):
        return False
    known = _fields(["--oneliner", "show", "job", scheduler.checked(job)])
    if known.get("Requeue") != "1" or not known.get("Partition"):
        return False
    partition = _fields(["--oneliner", "show", "partition", known["Partition"]])
    return "REQUEUE" in partition.get("PreemptMode", "").split(",")


def _fields(arguments: list[str]) -> dict[str, str]:
    return dict(_FIELD.findall(scheduler.run(["scontrol", *arguments])))


def _version(text: str) -> tuple[int, ...]:
    """Of `24.11.5`; () if it is none."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else ()
