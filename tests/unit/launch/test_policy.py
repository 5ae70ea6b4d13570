"""What follows an end of the ranks: one table, and the budget of restarts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launch.failures import of_srun
from launch.job_states import STATES, Phase
from launch.policy import NO_ANSWER, Action, Budget, Ending, crashed, decide, first_failure, known_status, lost_work

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


FAILED_SAVE = Ending(1, "SIGUSR2", job_state="RUNNING", lost_work=True)
TOO_SHORT = Ending(75, "SIGUSR2", job_state="RUNNING")  # a time limit that the start of the run does not fit into


@pytest.mark.parametrize(
    ("ending", "counts"),
    [
        (FAILED_SAVE, True),
        (replace(FAILED_SAVE, status=137), True),
        (replace(FAILED_SAVE, preempted=True), True),
        (TOO_SHORT, True),
        (replace(TOO_SHORT, signal="SIGTERM"), True),
        (replace(TOO_SHORT, preempted=True), False),
        (replace(TOO_SHORT, signal="SIGTERM", preempted=True), False),
        # nobody requeues it, SLURM does, or it is counted as a crash
        (replace(FAILED_SAVE, signal="SIGUSR1"), False),
        (replace(FAILED_SAVE, stop_asked=True), False),
        (replace(FAILED_SAVE, job_state="COMPLETING"), False),
        (replace(FAILED_SAVE, job_state=NO_ANSWER), False),
        (replace(FAILED_SAVE, job_state=None), False),
        (replace(FAILED_SAVE, status=74), False),
    ],
    ids=str,
)
def test_requeues_in_a_row_without_a_new_checkpoint_are_bounded(ending: Ending, counts: bool) -> None:
    assert ending.requeue_counts == counts
    if ending.job_state != "RUNNING" or ending.ends_run or crashed(ending):
        return
    budget = Budget()
    actions, why = [], ""
    for step in (10, 10, 10, 20, 20, 20, 20):
        budget = budget.ended(step=step, crashed=False, requeue_counts=ending.requeue_counts)
        action, why = decide(ending, budget, max_restarts=0, max_without_progress=2)
        actions.append(action)
    assert budget.restarts == 0
    assert actions == [Action.REQUEUE] * 6 + [Action.GIVE_UP if counts else Action.REQUEUE]
    if counts:
        assert why.startswith("ended 3 times in a row without a new checkpoint (the newest is of step 20)")
        assert "max_restarts_without_progress is 2; at last " in why
        assert ("exit status" in why and "before a save" in why) == ending.unsaved


def test_crashes_and_failed_saves_are_one_count() -> None:
    budget = Budget().ended(step=0, crashed=True).ended(step=0, crashed=False, requeue_counts=True)
    assert (budget.restarts, budget.without_progress) == (1, 2)
    assert budget.ended(step=0, crashed=False) == budget
    assert budget.ended(step=5, crashed=False).without_progress == 0


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


@pytest.mark.parametrize("asked", [{"signal": "SIGUSR1"}, {"stop_asked": True}, {"signal": "SIGUSR2"}])
@pytest.mark.parametrize("status", [1, 74, 75, 137, 139, 143])
@pytest.mark.parametrize(
    ("names", "orderly"),
    [
        (["launch"], True),  # no rank had begun: there was nothing to save
        (["launch", "resume", "stop"], True),
        (["launch", "resume", "finish"], True),
        (["launch", "resume", "save_begin"], False),
    ],
)
def test_a_stop_is_one_only_if_nothing_is_lost(
    asked: dict[str, Any], status: int, names: list[str], orderly: bool
) -> None:
    ending = Ending(status, **asked, job_state="RUNNING", lost_work=lost_work([{"event": name} for name in names]))
    assert ending.unsaved == (not orderly and status != 75)
    wrong = status in (74, 139)  # nobody ends ranks so to stop them
    assert ending.exit_status == (status if ending.unsaved or wrong else 75)
    action, why = decide(ending, Budget(), max_restarts=3, max_without_progress=2)
    again = Action.RETRY if wrong else Action.REQUEUE
    assert action is (again if asked == {"signal": "SIGUSR2"} else Action.END)
    if ending.unsaved and action is not Action.RETRY:
        assert "asked to stop" in why and why.endswith(f"but ended with exit status {status} before a save")


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


@pytest.mark.parametrize(
    ("status", "said", "known", "named", "action"),
    [
        # srun gives the highest of all statuses: 137 and 143 are those of ranks that it ended itself
        (143, ["n2: task 1: Killed", "n1: task 0: Terminated"], 137, "rank 1 on n2: killed by SIGKILL", Action.RETRY),
        (143, ["n2: task 1: Exited with exit code 1", "n1: task 0: Terminated"], 1, "n2: exit status 1", Action.RETRY),
        (137, ["n1: tasks 0-1: Exited with exit code 3", "n2: task 2: Killed"], 3, "ranks 0-1 on n1", Action.END),
        # others lost the connection to a rank that found its data damaged, and ended before it
        (
            143,
            ["n1: task 0: Exited with exit code 1", "n2: task 1: Exited with exit code 3"],
            3,
            "rank 1 on n2",
            Action.END,
        ),
        (139, ["n2: task 7: Segmentation fault (core dumped)", "n1: task 0: Killed"], 139, "by SIGSEGV", Action.RETRY),
        (137, ["n2: task 7: Out Of Memory", "n1: task 0: Killed"], 137, "rank 7 on n2: Out Of Memory", Action.RETRY),
        (143, ["n1: task 0: Exited with exit code 75", "n2: task 1: Terminated"], 75, "exit status 75", Action.REQUEUE),
        (137, ["Node failure on n2", "Job step aborted: Waiting up to 32 seconds"], 137, "None", Action.RETRY),
        (0, [], 0, "None", Action.END),
    ],
)
def test_the_rank_that_failed_first_decides_and_is_named(
    status: int, said: list[str], known: int, named: str, action: Action
) -> None:
    failed = first_failure(of_srun("".join(f"srun: error: {line}\n" for line in said)))
    assert known_status(status, [{"event": "start"}, {"event": "finish"}], failed) == known
    assert named in str(failed)
    ending = Ending(known, "SIGUSR2" if known == 75 else None, job_state="RUNNING", failed=failed)
    budget = Budget().ended(step=10, crashed=crashed(ending))
    for restarts in (3, 0):
        found, why = decide(ending, budget, max_restarts=restarts, max_without_progress=2)
        assert found is (Action.GIVE_UP if restarts == 0 and action is Action.RETRY else action)
        assert action is not Action.RETRY or str(failed or "") in why
