# What follows when the ranks of an attempt have ended: a pure function of how, and of what happened before.
# It looks at nothing and does nothing: job.py does.
"""Finish, requeue, retry, leave it to SLURM, or give up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from launch.job_states import Phase, phase_of

STOPPED, GAVE_UP = 75, 5
NO_ANSWER = "no answer"
# What a person has to mend: trying again would say the same again.
FINAL = (2, 3, 4, 5)
# Exit statuses of a process that a request to save ended before it could note it: SIGUSR1, SIGUSR2, SIGTERM.
_STOPPED_EARLY = (128 + 10, 128 + 12, 128 + 15)


class Action(StrEnum):
    """What to do next."""

    END = "end"  # with the ranks' exit status
    REQUEUE = "requeue"  # by ourselves, once
    RETRY = "retry"  # the ranks again, on the same nodes
    GIVE_UP = "give_up"


@dataclass(frozen=True)
class Budget:
    """Restarts after crashes, over all attempts of a launch.

    Attributes:
        restarts: so far.
        without_progress: attempts in a row that crashed without a new committed checkpoint.
        step: newest committed one when the last attempt ended.
    """

    restarts: int = 0
    without_progress: int = 0
    step: int = 0

    def ended(self, *, step: int, crashed: bool) -> Budget:
        """The budget after an attempt that left `step` as the newest committed one."""
        progressed = step > self.step
        if not crashed:
            return replace(self, step=step, without_progress=0 if progressed else self.without_progress)
        return Budget(self.restarts + 1, 0 if progressed else self.without_progress + 1, step)


@dataclass(frozen=True)
class Ending:
    """How the ranks ended.

    Attributes:
        status: exit status of srun or of the local launcher.
        signal: what the ranks agreed to stop for, or this process was sent; None: nothing.
        stop_asked: a person asked for a stop for good.
        job_state: SLURM's word for the job now; None without SLURM, NO_ANSWER if it did not answer.
        cause: what a crash is known to come from, e.g. `out of memory`; "" if nothing is.
    """

    status: int
    signal: str | None = None
    stop_asked: bool = False
    job_state: str | None = None
    cause: str = ""

    @property
    def needs_slurm(self) -> bool:
        """Whether what follows depends on what becomes of the job. A run that is over by its own account does not."""
        return not (self.status in (0, *FINAL) or self.stop_asked or self.signal == "SIGUSR1")

    @property
    def ends_run(self) -> bool:
        """Whether the run is over by its own account, and no other job should go on."""
        return not self.needs_slurm

    @property
    def left_to_slurm(self) -> bool:
        """Whether SLURM has ended the ranks, and decides whether the job comes back."""
        if self.job_state in (None, NO_ANSWER):
            return False
        return self.needs_slurm and phase_of(str(self.job_state)) not in (Phase.RUNNING, Phase.PAUSED)


def known_status(status: int, events: Sequence[Mapping[str, Any]]) -> int:
    """The exit status of srun, unless it is 0 for ranks that trained and never said that they ended: then 1.

    srun ends with 0 when a node fails and the step does not answer in time.

    Args:
        status: of srun or of the local launcher.
        events: of the attempt.
    """
    names = {event["event"] for event in events}
    return 1 if status == 0 and names & {"start", "resume"} and not names & {"finish", "stop"} else status


def crashed(ending: Ending) -> bool:
    """Whether nobody asked for this end, and trying again may help."""
    if ending.status in (0, STOPPED, *FINAL):
        return False
    asked = ending.signal is not None or ending.stop_asked
    return not (asked and ending.status in (*_STOPPED_EARLY, 128 + 9, 1))


def decide(ending: Ending, budget: Budget, *, max_restarts: int, max_without_progress: int) -> tuple[Action, str]:
    """What follows, and why.

    Args:
        ending: of the ranks.
        budget: this attempt counted in.
        max_restarts: `resilience.max_restarts`.
        max_without_progress: `resilience.max_restarts_without_progress`.
    """
    if ending.status == 0:
        return Action.END, "finished"
    if ending.status in FINAL:
        return Action.END, f"exit status {ending.status}: starting again would not help"
    if ending.stop_asked or ending.signal == "SIGUSR1":
        return Action.END, "stopped on request"
    if ending.left_to_slurm:
        return Action.END, f"the job is {ending.job_state}: what follows is SLURM's business"
    if not crashed(ending):
        why = f"stopped for {ending.signal or 'a signal'}"
        if ending.job_state == NO_ANSWER:
            return Action.END, f"{why}; SLURM did not answer in time, so nobody has requeued the job: `mmscale resume`"
        return (Action.END if ending.job_state is None else Action.REQUEUE), why
    if budget.restarts > max_restarts:
        return Action.GIVE_UP, f"crashed {budget.restarts} times, resilience.max_restarts is {max_restarts}"
    if budget.without_progress > max_without_progress:
        return Action.GIVE_UP, (
            f"crashed {budget.without_progress} times in a row without a new checkpoint (the newest is of step "
            f"{budget.step}); resilience.max_restarts_without_progress is {max_without_progress}"
        )
    cause = f" ({ending.cause})" if ending.cause else ""
    return Action.RETRY, f"crashed with exit status {ending.status}{cause}; restart {budget.restarts} of {max_restarts}"
