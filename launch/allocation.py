# The job that a supervising process runs in, and what it asks SLURM about it. An outage of slurmctld decides nothing:
# questions are repeated for the profile's `slurm_patience`. What follows from the answers is policy.py's and job.py's.
"""One's own allocation."""

from __future__ import annotations

from collections.abc import Callable

from launch import scheduler
from launch.policy import NO_ANSWER
from launch.scheduler import UnreachableError, patiently
from mmscale.errors import LaunchError

_SHORT_S = 10.0  # of a question that nothing waits for: `scontrol` itself gives up after 9 s or more


class Allocation:
    """A job of SLURM, from within.

    Args:
        job: its id; "" without SLURM, and then nothing is ever asked.
        patience_s: how long a question is repeated while slurmctld does not answer [seconds].
        interrupted: whether this process was asked to end, looked at while it waits for an answer.
    """

    def __init__(self, job: str, *, patience_s: float, interrupted: Callable[[], bool]) -> None:
        self.job = job
        self.patience_s = patience_s
        self.interrupted = interrupted

    def wait_for_slurm(self) -> None:
        """Wait until slurmctld answers: no step can be started before.

        Raises:
            UnreachableError: it did not in time, or this process was asked to end.
        """
        if self.job:
            patiently(lambda: scheduler.job_state(self.job), patience_s=self.patience_s, give_up=self.interrupted)

    def state(self, *, patiently_asked: bool) -> str | None:
        """SLURM's word for this job; `NO_ANSWER` if there is none; None without SLURM.

        Args:
            patiently_asked: wait for an answer. Ranks that are started again in place do not.
        """
        if not self.job:
            return None
        try:
            found = patiently(
                lambda: scheduler.job_state(self.job, timeout_s=_SHORT_S),
                patience_s=self.patience_s if patiently_asked else 0.0,
            )
        except UnreachableError:
            return NO_ANSWER
        return found.state if found is not None else "UNKNOWN"

    def preempted(self) -> bool:
        """Whether SLURM has asked this job to make room; not where it does not answer."""
        try:
            found = scheduler.job_state(self.job, timeout_s=_SHORT_S) if self.job else None
        except LaunchError:
            return False
        return found is not None and found.preempted

    def lost_nodes(self, hosts: str) -> dict[str, str]:
        """Those of its nodes that have failed, with their state; none where SLURM does not answer."""
        try:
            return patiently(lambda: scheduler.lost_nodes(hosts), patience_s=self.patience_s, give_up=self.interrupted)
        except UnreachableError:
            return {}

    def requeue(self) -> str:
        """Have SLURM start this job again; why it does not, "" if it does."""
        try:
            patiently(lambda: scheduler.requeue(self.job), patience_s=self.patience_s)
        except LaunchError as error:
            return error.cause
        return ""
