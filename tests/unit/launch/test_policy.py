"""What follows an end of the ranks: one table, and the budget of restarts."""

from __future__ import annotations

import pytest

from launch.job_states import STATES, Phase
from launch.policy import NO_ANSWER, Action, Budget, Ending, crashed, decide, known_status

_OURS = (Phase.RUNNING, Phase.PAUSED)
CASES = [
    # how the ranks ended, and what must follow
    (Ending(0, job_state="RUNNING"), Action.END),
    (Ending(75, "SIGUSR2", job_state="RUNNING"), Action.REQUEUE),
    (Ending(75, "SIGTERM", job_state="RUNNING"), Action.REQUEUE),  # preemption without a user's signal
    (Ending(75, "SIGTERM", job_state="CANCELLED"), Action.END),
    (Ending(75, "SIGTERM", job_state="COMPLETING"), Action.END),  # scontrol requeue by somebody else
    (Ending(75, "SIGUSR1", job_state="RUNNING"), Action.END),
    (Ending(75, "SIGUSR2", stop_asked=True, job_state="RUNNING"), Action.END),
    (Ending(75, "SIGTERM"), Action.END),  # without SLURM nobody starts it again
    (Ending(140, "SIGUSR2", job_state="RUNNING"), Action.REQUEUE),  # a rank that could not note the signal yet
    (Ending(137, job_state="RUNNING"), Action.RETRY),
    (Ending(1, job_state="RUNNING"), Action.RETRY),
    (Ending(1), Action.RETRY),
    (Ending(74, job_state="RUNNING"), Action.RETRY),  # storage may come back
    (Ending(137, job_state="COMPLETING"), Action.END),  # a lost node: SLURM requeues by itself
    *((Ending(status, job_state="RUNNING"), Action.END) for status in (2, 3, 4, 5)),
    # slurmctld is away: a crash is mended without it, the last step and a stop for good need no answer
    (Ending(137, job_state=NO_ANSWER), Action.RETRY),
    (Ending(0, job_state=NO_ANSWER), Action.END),
    (Ending(75, "SIGUSR1", job_state=NO_ANSWER), Action.END),
    (Ending(75, "SIGUSR2", job_state=NO_ANSWER), Action.END),  # after slurm_patience; `mmscale resume` goes on
    # what follows in each state of a job: ours where it runs, SLURM's where it waits, is being ended or has ended
    *(
        (Ending(status, signal, job_state=state), ours if meaning.phase in _OURS else Action.END)
        for state, meaning in STATES.items()
        for status, signal, ours in ((137, None, Action.RETRY), (75, "SIGTERM", Action.REQUEUE))
    ),
]


@pytest.mark.parametrize(("ending", "action"), CASES, ids=lambda value: str(value))
def test_what_follows(ending: Ending, action: Action) -> None:
    budget = Budget().ended(step=10, crashed=crashed(ending))
    assert decide(ending, budget, max_restarts=3, max_without_progress=2)[0] is action


def test_restarts_are_counted_over_the_whole_launch_and_only_crashes() -> None:
    crash, stop = Ending(137, job_state="RUNNING"), Ending(75, "SIGUSR2", job_state="RUNNING")
    budget = Budget()
    actions = []
    for number, ending in enumerate((crash, stop, crash, stop, crash), start=1):
        budget = budget.ended(step=10 * number, crashed=crashed(ending))
        actions.append(decide(ending, budget, max_restarts=2, max_without_progress=9)[0])
    assert actions == [Action.RETRY, Action.REQUEUE, Action.RETRY, Action.REQUEUE, Action.GIVE_UP]


def test_attempts_without_a_new_checkpoint_are_counted_in_a_row() -> None:
    crash = Ending(1, job_state="RUNNING")
    budget = Budget()
    actions = []
    for step in (10, 10, 20, 20, 20):
        budget = budget.ended(step=step, crashed=True)
        actions.append(decide(crash, budget, max_restarts=99, max_without_progress=1)[0])
    assert actions == [Action.RETRY] * 4 + [Action.GIVE_UP]


def test_no_restarts_at_all() -> None:
    budget = Budget().ended(step=0, crashed=True)
    action, why = decide(Ending(1), budget, max_restarts=0, max_without_progress=9)
    assert action is Action.GIVE_UP and "resilience.max_restarts is 0" in why


def test_the_cause_of_a_crash_is_named() -> None:
    ending = Ending(137, job_state="RUNNING", cause="out of memory: rank 1 on n2")
    _, why = decide(ending, Budget(restarts=1), max_restarts=3, max_without_progress=2)
    assert "exit status 137 (out of memory: rank 1 on n2); restart 1 of 3" in why


def test_only_an_end_that_is_final_needs_no_word_of_slurm() -> None:
    assert not any(Ending(status).needs_slurm for status in (0, 2, 3, 4, 5))
    assert not Ending(75, "SIGUSR1").needs_slurm and not Ending(75, stop_asked=True).needs_slurm
    assert Ending(75, "SIGUSR2").needs_slurm and Ending(137).needs_slurm
    assert Ending(137, job_state="COMPLETING").left_to_slurm and not Ending(137, job_state=NO_ANSWER).left_to_slurm


@pytest.mark.parametrize(
    ("status", "names", "known"),
    [
        (0, ["launch", "start", "save_committed", "finish"], 0),
        (0, ["launch"], 0),  # ranks that found the run done
        (0, ["launch", "start", "save_committed"], 1),  # srun after the failure of a node
        (0, ["launch", "resume"], 1),
        (137, ["launch", "start"], 137),
        (75, ["launch", "start", "stop"], 75),
    ],
)
def test_ranks_that_did_not_say_that_they_ended_have_not_finished(status: int, names: list[str], known: int) -> None:
    assert known_status(status, [{"event": name} for name in names]) == known
