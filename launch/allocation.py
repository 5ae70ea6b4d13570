"""The supervisor's view of its own SLURM job.

The supervisor's own job, and its queries to SLURM about it. Queries are repeated for the profile's `slurm_patience`, so
an outage of slurmctld changes no decision. policy.py and job.py decide on the answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from launch import preemption, scheduler
from launch.job_states import Phase
from launch.policy import NO_ANSWER, Ending, crashed
from launch.scheduler import UnreachableError, with_retries
from mmscale.errors import LaunchError

_POLL_S = 0.1
_KILLED_S = 90.0  # SLURM ends a requeued job within KillWait
_SHORT_S = 10.0  # timeout of an optional query: `scontrol` itself gives up after 9 s or more


class Allocation:
    """The SLURM job that this process runs in.

    Args:
        job: its id; "" without SLURM, and then nothing is queried.
        patience_s: how long a query is repeated while slurmctld does not answer [seconds].
        interrupted: whether this process was asked to end; polled while it waits for an answer.
    """

    def __init__(self, job: str, *, patience_s: float, interrupted: Callable[[], bool]) -> None:
        self.job = job
        self.patience_s = patience_s
        self.interrupted = interrupted

    def wait_for_slurm(self) -> None:
        """Wait until slurmctld answers, because no step can start before.

        Raises:
            UnreachableError: there was no answer in time, or this process was asked to end.
        """
        if self.job:
            with_retries(lambda: scheduler.job_state(self.job), patience_s=self.patience_s, give_up=self.interrupted)

    def state(self, *, retry: bool) -> str | None:
        """SLURM's state of this job; `NO_ANSWER` if there is no answer; None without SLURM.

        Args:
            retry: wait for an answer. A restart of ranks in place does not wait.
        """
        if not self.job:
            return None
        try:
            found = with_retries(
                lambda: scheduler.job_state(self.job, timeout_s=_SHORT_S),
                patience_s=self.patience_s if retry else 0.0,
            )
        except UnreachableError:
            return NO_ANSWER
        return found.state if found is not None else "UNKNOWN"

    def with_state(self, ending: Ending) -> Ending:
        """An end of ranks with SLURM's state of the job, if the decision depends on it; a crash needs no answer."""
        if not ending.needs_slurm:
            return ending
        asked = not crashed(ending)
        return replace(ending, job_state=self.state(retry=asked), preempted=asked and self.preempted())

    def preempted(self) -> bool:
        """Whether SLURM has preempted this job; False without an answer."""
        found = self._seen()
        return found is not None and found.preempted

    def taken_away(self) -> bool:
        """Whether SLURM has preempted this job or is ending it, e.g. for a failed node; False without an answer."""
        found = self._seen()
        return found is not None and (found.preempted or found.phase in (Phase.ENDING, Phase.ENDED))

    def _seen(self) -> scheduler.JobState | None:
        try:
            return scheduler.job_state(self.job, timeout_s=_SHORT_S) if self.job else None
        except LaunchError:
            return None

    def lost_nodes(self, hosts: str) -> dict[str, str]:
        """The failed nodes of a host list, with their states; empty without an answer."""
        try:
            return with_retries(
                lambda: scheduler.lost_nodes(hosts), patience_s=self.patience_s, give_up=self.interrupted
            )
        except UnreachableError:
            return {}

    def requeued_at_end(self, *, before: int) -> bool:
        """`preemption.requeued_at_end` for this job, which has been preempted; False without an answer."""
        try:
            return with_retries(lambda: preemption.requeued_at_end(self.job, before=before), patience_s=self.patience_s)
        except LaunchError:
            return False

    def requeue(self) -> str:
        """Requeue this job and wait until SLURM ends this process.

        Returns:
            The reason for a refusal, "" on success.
        """
        try:
            with_retries(lambda: scheduler.requeue(self.job), patience_s=self.patience_s)
        except LaunchError as error:
            return error.cause
        deadline = time.monotonic() + _KILLED_S
        while not self.interrupted() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return ""
