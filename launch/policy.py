"""Decides between finish, requeue, retry, leaving it to SLURM, and giving up.

The decision after the ranks of an attempt have ended: a pure function of how they ended and of earlier attempts. job.py
gathers the facts and acts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from launch.failures import Failure
from launch.job_states import Phase, phase_of
from mmscale.runs.events import BEGINS, ORDERLY_ENDS

STOPPED, GAVE_UP = 75, 5
NO_ANSWER = "no answer"
# Statuses that need a person: a restart would fail in the same way.
FINAL = (2, 3, 4, 5)
# Exit statuses of a process that a request to save ended before it could handle it: SIGUSR1, SIGUSR2, SIGTERM.
_STOPPED_EARLY = (128 + 10, 128 + 12, 128 + 15)


class Action(StrEnum):
    """What to do next."""

    END = "end"  # with the ranks' exit status
    REQUEUE = "requeue"  # by the job itself, once
    RETRY = "retry"  # restart the ranks on the same nodes
    GIVE_UP = "give_up"


@dataclass(frozen=True)
class Budget:
    """Restarts of a launch, over all of its attempts.

    Attributes:
        restarts: after crashes, so far.
        without_progress: consecutive ends without a new committed checkpoint: crashes, and requeues that count
            (`Ending.requeue_counts`).
        step: newest committed checkpoint when the last attempt ended.
        by_slurm: requeues by slurmctld at the end of preempted jobs (preemption.py).
    """

    restarts: int = 0
    without_progress: int = 0
    step: int = 0
    by_slurm: int = 0

    def ended(self, *, step: int, crashed: bool, requeue_counts: bool = False) -> Budget:
        """The budget after an attempt that left `step` as the newest committed one."""
        without_progress = 0 if step > self.step else self.without_progress + (crashed or requeue_counts)
        return replace(self, restarts=self.restarts + crashed, without_progress=without_progress, step=step)


@dataclass(frozen=True)
class Ending:
    """How the ranks ended.

    Attributes:
        status: exit status of srun or of the local launcher.
        signal: signal for which the ranks agreed to stop, or which this process received; None: none.
        stop_asked: a person requested a final stop.
        job_state: SLURM's present state of the job; None without SLURM, NO_ANSWER if it did not answer.
        cause: known cause of a crash, e.g. `out of memory`; "" if unknown.
        failed: the rank that failed first; None if unknown.
        lost_work: ranks trained and did not record an end, so steps since the last checkpoint are lost.
        preempted: SLURM has preempted the job.
    """

    status: int
    signal: str | None = None
    stop_asked: bool = False
    job_state: str | None = None
    cause: str = ""
    failed: Failure | None = None
    lost_work: bool = False
    preempted: bool = False

    @property
    def unsaved(self) -> bool:
        """Whether the ranks were asked to stop, and failed before they had saved."""
        asked = self.signal is not None or self.stop_asked
        return asked and self.lost_work and self.status not in (0, STOPPED, *FINAL)

    @property
    def exit_status(self) -> int:
        """Exit status of a job that ends with its ranks: theirs, or `STOPPED` if they stopped as they were asked to."""
        return self.status if self.status in (0, *FINAL) or self.unsaved or crashed(self) else STOPPED

    @property
    def needs_slurm(self) -> bool:
        """Whether the decision depends on SLURM's state of the job; not if the run itself has recorded its end."""
        return not (self.status in (0, *FINAL) or self.stop_asked or self.signal == "SIGUSR1")

    @property
    def ends_run(self) -> bool:
        """Whether the run itself has recorded its end, so that no other job should continue it."""
        return not self.needs_slurm

    @property
    def requeue_counts(self) -> bool:
        """Whether the job requeues itself and would do the same for ever if nothing changed.

        A save that fails does so after every request. A time limit that is too short for the start of the run is
        reached at every start. A preemption says nothing about the run, unless a save has failed.
        """
        ours = self.job_state not in (None, NO_ANSWER) and self.needs_slurm and not self.left_to_slurm
        return ours and not crashed(self) and (self.unsaved or not self.preempted)

    @property
    def left_to_slurm(self) -> bool:
        """Whether SLURM has ended the ranks and decides whether the job is requeued."""
        if self.job_state in (None, NO_ANSWER):
            return False
        return self.needs_slurm and phase_of(str(self.job_state)) not in (Phase.RUNNING, Phase.PAUSED)


def first_failure(failures: Sequence[Failure]) -> Failure | None:
    """The failure that decides: one that needs a person if there is one, otherwise the first.

    A rank with an error in its data may end later than the others, which only lost the connection to it.
    """
    return next((one for one in failures if one.status in FINAL), failures[0] if failures else None)


def known_status(status: int, events: Sequence[Mapping[str, Any]], failed: Failure | None = None) -> int:
    """The exit status of the rank that failed first, or that of srun if no rank did.

    It is 1 if srun ended with 0 although ranks trained and never recorded an end: srun ends with 0 when a node fails
    and the step does not answer in time.

    Args:
        status: of srun or of the local launcher.
        events: of the attempt.
        failed: from `first_failure`.
    """
    if status != 0:
        return (failed.status if failed is not None else None) or status
    return 1 if lost_work(events) else status


def lost_work(events: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the ranks of an attempt trained and never recorded an end, which follows their last save."""
    names = {event["event"] for event in events}
    return bool(names & {*BEGINS}) and not names & {*ORDERLY_ENDS}


def crashed(ending: Ending) -> bool:
    """Whether the end was not requested and a restart may help."""
    if ending.status in (0, STOPPED, *FINAL):
        return False
    asked = ending.signal is not None or ending.stop_asked
    return not (asked and ending.status in (*_STOPPED_EARLY, 128 + 9, 1))


def decide(ending: Ending, budget: Budget, *, max_restarts: int, max_without_progress: int) -> tuple[Action, str]:
    """The action, and its reason.

    Args:
        ending: of the ranks.
        budget: with this attempt counted.
        max_restarts: `resilience.max_restarts`.
        max_without_progress: `resilience.max_restarts_without_progress`.
    """
    if ending.status == 0:
        return Action.END, "finished"
    if ending.status in FINAL:
        return Action.END, f"exit status {ending.status}: starting again would not help"
    cause = ending.cause or str(ending.failed or "")
    named = f" ({cause})" if cause else ""
    unsaved = f", but ended with exit status {ending.status}{named} before a save" if ending.unsaved else ""
    if ending.stop_asked or ending.signal == "SIGUSR1":
        return Action.END, f"asked to stop{unsaved}" if unsaved else "stopped on request"
    if ending.left_to_slurm:
        return Action.END, f"the job is {ending.job_state}: SLURM decides what follows"
    if not crashed(ending):
        signal = ending.signal or "a signal"
        why = f"asked to stop by {signal}{unsaved}" if unsaved else f"stopped for {signal}"
        if ending.job_state == NO_ANSWER:
            return Action.END, f"{why}; SLURM did not answer in time, so nobody has requeued the job: `mmscale resume`"
        if ending.requeue_counts and budget.without_progress > max_without_progress:
            return Action.GIVE_UP, f"{_no_progress(budget, max_without_progress)}; at last {why}"
        return (Action.END if ending.job_state is None else Action.REQUEUE), why
    if budget.restarts > max_restarts:
        why = f"crashed {budget.restarts} times, resilience.max_restarts is {max_restarts}"
    elif budget.without_progress > max_without_progress:
        why = _no_progress(budget, max_without_progress)
    else:
        why = f"crashed with exit status {ending.status}{named}; restart {budget.restarts} of {max_restarts}"
        return Action.RETRY, why
    return Action.GIVE_UP, f"{why}; at last {cause}" if cause else why


def _no_progress(budget: Budget, most: int) -> str:
    times = "once" if budget.without_progress == 1 else f"{budget.without_progress} times in a row"
    newest = f"the newest is of step {budget.step}" if budget.step else "there is none"
    return f"ended {times} without a new checkpoint ({newest}); resilience.max_restarts_without_progress is {most}"
