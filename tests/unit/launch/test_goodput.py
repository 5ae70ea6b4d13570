"""Where the time of a run went: every second of the events is in exactly one part."""

from __future__ import annotations

from typing import Any

import pytest

from launch.goodput import goodput


def event(time: float, attempt: int, name: str, **fields: Any) -> dict[str, Any]:
    return {"time": time, "attempt": attempt, "event": name, **fields}


def steps(attempt: int, first: int, last: int, seconds: float, **fields: float) -> list[dict[str, Any]]:
    return [
        {"step": n, "attempt": attempt, "step_time_s": seconds, "loss": 1.0, **fields} for n in range(first, last + 1)
    ]


def test_a_run_without_faults() -> None:
    events = [event(0, 1, "launch"), event(10, 1, "start", step=0), event(61, 1, "finish"), event(62, 1, "ranks_ended")]
    metrics = [
        *steps(1, 1, 49, 1.0),
        {"step": 50, "attempt": 1, "step_time_s": 1.0, "save_stall_s": 0.5, "eval_s": 0.5},
    ]
    share, times = goodput(events, metrics, now=1000)
    assert times == {
        "start_up": 10,
        "steps": 50,
        "save_stall": 0.5,
        "evaluation": 0.5,
        "lost": 0,
        "other": 1,
        "waiting": 0,
    }
    assert share == pytest.approx(50 / 62)


def test_work_that_is_done_again_is_lost() -> None:
    """Killed after step 17, noticed 3 s later; goes on from step 10 after 5 s of start-up."""
    events = [
        event(0, 1, "launch"),
        event(10, 1, "start", step=0),
        event(30, 1, "ranks_ended"),
        event(40, 2, "launch"),
        event(45, 2, "resume", step=10),
        event(55, 2, "finish"),
        event(55, 2, "ranks_ended"),
    ]
    share, times = goodput(events, [*steps(1, 1, 17, 1.0), *steps(2, 11, 20, 1.0)], now=1000)
    assert times == {
        "start_up": 15,
        "steps": 20,
        "save_stall": 0,
        "evaluation": 0,
        "lost": 10,
        "other": 0,
        "waiting": 10,
    }
    assert share == pytest.approx(20 / 45)


def test_an_attempt_that_never_trained_is_all_start_up() -> None:
    events = [event(0, 1, "launch"), event(7, 1, "ranks_ended"), event(9, 2, "launch")]
    assert goodput(events, [], now=12) == (
        0.0,
        {**dict.fromkeys(("steps", "save_stall", "evaluation", "lost", "other"), 0.0), "start_up": 10, "waiting": 2},
    )


@pytest.mark.parametrize("resumed", [True, False])
def test_steps_that_are_not_logged_but_saved_count(resumed: bool) -> None:
    """Every tenth step is logged; asked to stop after step 37, which is saved a second later."""
    events = [event(0, 1, "launch"), event(2, 1, "start", step=0), event(40, 1, "stop", step=37)]
    events += [event(42, 1, "ranks_ended")]
    events += [event(50, 2, "launch"), event(50, 2, "resume", step=37), event(50, 2, "ranks_ended")] if resumed else []
    metrics = [line for line in steps(1, 1, 30, 1.0) if line["step"] % 10 == 0]
    _, times = goodput(events, metrics, now=1000)
    assert (times["steps"], times["lost"], times["other"]) == (37, 0, 3)


def test_nodes_that_are_examined_are_allocated_time() -> None:
    events = [event(5, 1, "launch", since=1.0), event(7, 1, "start", step=0), event(8, 1, "stop")]
    events += [event(9, 1, "ranks_ended"), event(30, 2, "launch", since=21.0), event(31, 2, "ranks_ended")]
    share, times = goodput(events, steps(1, 1, 1, 1.0), now=31)
    assert (times["start_up"], times["steps"], times["other"], times["waiting"]) == (6 + 10, 1, 1, 12)
    assert share == pytest.approx(1 / 18)


def test_a_run_without_a_launcher_begins_with_its_process() -> None:
    """Of `mmscale train` at a terminal there is no launch event; versions before `since` knew no start-up."""
    events = [event(10, 1, "start", step=0, since=4.0), event(30, 1, "stop", step=20)]
    events += [event(50, 2, "resume", step=20), event(70, 2, "finish", step=40)]
    share, times = goodput(events, [*steps(1, 1, 20, 1.0), *steps(2, 21, 40, 1.0)], now=1000)
    assert (times["start_up"], times["steps"], times["waiting"]) == (6, 40, 20)
    assert share == pytest.approx(40 / 46)


def test_a_step_that_is_being_computed_is_not_lost_yet() -> None:
    events = [event(0, 1, "launch"), event(2, 1, "start", step=0)]
    share, times = goodput(events, steps(1, 1, 5, 1.0), now=8)
    assert times["steps"] == 6 and times["lost"] == 0
    assert share == pytest.approx(6 / 8)


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("began", [0, 20])
def test_what_precedes_the_first_step_is_start_up(began: int, every: int, over: bool) -> None:
    """The batch that finds errors early takes 30 s; then 10 steps of 2 s, of which every fifth is logged, and 1 s."""
    begins = event(2, 1, "resume" if began else "start", step=began, since=0.0)
    events = [begins] + ([event(53, 1, "stop", step=began + 10)] if over else [])
    metrics = [
        {"step": began + n, "attempt": 1, "step_time_s": 2.0, "time": 32.0 + 2.0 * n}
        for n in range(1, 11)
        if n % every == 0
    ]
    _, times = goodput(events, metrics, now=53)
    assert (times["start_up"], times["steps"], times["other"]) == (32, 20 if over else 21, 1 if over else 0)


def test_an_attempt_that_has_not_logged_a_step_starts_up() -> None:
    events = [event(0, 1, "launch"), event(2, 1, "start", step=0)]
    share, times = goodput(events, [], now=40)
    assert (share, times["start_up"], times["steps"]) == (0.0, 40, 0)


def test_logged_every_tenth_step() -> None:
    events = [event(0, 1, "launch"), event(0, 1, "start", step=0), event(40, 1, "ranks_ended"), event(40, 2, "launch")]
    events.append(event(41, 2, "resume", step=25))
    metrics = [{"step": n, "attempt": 1, "step_time_s": 1.0} for n in (10, 20, 30, 40)]
    _, times = goodput(events, metrics, now=41)
    assert times["steps"] == 25 and times["lost"] == 15


@pytest.mark.parametrize("number", [1, 7, 20])
def test_the_parts_are_the_whole(number: int) -> None:
    """Any number of preemptions: nothing is counted twice, nothing is left out."""
    events, metrics, now, step = [], [], 0.0, 0
    for attempt in range(1, number + 1):
        begin = now
        done = attempt * 7 % 5 + 1
        events += [event(begin, attempt, "launch"), event(begin + 3, attempt, "resume", step=step)]
        metrics += steps(attempt, step + 1, step + done, 0.5, save_stall_s=0.1)
        step += done - attempt % 2 * (attempt % 3 == 0)
        now = begin + 3 + done + 1.5
        events.append(event(now, attempt, "ranks_ended"))
        now += 2
    share, times = goodput(events, metrics, now=now)
    assert sum(times.values()) == pytest.approx(events[-1]["time"] - events[0]["time"])
    assert times["waiting"] == pytest.approx(2 * (number - 1))
    assert share == pytest.approx(times["steps"] / (sum(times.values()) - times["waiting"]))


@pytest.mark.parametrize(("end", "stopped", "resumed", "lost"), [
    ("finish", 20, None, 0.0),
    ("stop", 20, None, 0.0),
    ("stop", 20, 20, 0.0),
    ("stop", 20, 15, 5.0),  # its last checkpoint was damaged
    (None, None, 20, 3.0),  # killed after the save: 3 s until somebody noticed
    (None, None, 15, 8.0),
])  # fmt: skip
def test_lost_is_what_lies_behind_the_committed_save(
    end: str | None, stopped: int | None, resumed: int | None, lost: float
) -> None:
    """20 steps in 20 s, a last save of 2 s and an evaluation of 4 s, which no logged step can tell of."""
    pauses = {"save_stall_s": 2.0, "eval_s": 4.0} if end else {}
    events = [event(0, 1, "launch"), event(0, 1, "start", step=0)]
    events += [event(26, 1, end, step=stopped, **pauses)] if end else []
    events += [event(29 if end else 23, 1, "ranks_ended")]
    if resumed is not None:
        events += [event(40, 2, "launch"), event(40, 2, "resume", step=resumed)]
    _, times = goodput(events, steps(1, 1, 20, 1.0), now=40)
    assert times["lost"] == lost
    assert times["steps"] == min(20, resumed or 20)
    assert (times["save_stall"], times["evaluation"], times["other"]) == ((2, 4, 3) if end else (0, 0, 0))


@pytest.mark.parametrize(("recorded", "counted"), [({"step_time_s": 40.0}, 90.0), ({}, 30.0)])
def test_steps_after_the_last_logged_one_count_with_their_own_time(recorded: dict[str, float], counted: float) -> None:
    """Step 1 took 10 s; the machine was busy in steps 2 and 3, 40 s each. Older versions did not record their time."""
    events = [event(0, 1, "start", step=0), event(100, 1, "stop", step=3, **recorded)]
    _, times = goodput(events, steps(1, 1, 1, 10.0), now=100)
    assert (times["steps"], times["other"]) == (counted, 100 - counted)


def test_a_killed_attempt_lived_until_its_last_line() -> None:
    """Saved after 10 of 30 s, killed at 30 s, started again at 50 s: the page says the same, from the same lines."""
    events = [event(0, 1, "start", step=0), event(10, 1, "save_committed", step=10), event(50, 2, "resume", step=10)]
    metrics = [line | {"time": float(line["step"])} for line in steps(1, 1, 30, 1.0)]
    _, times = goodput(events, metrics, now=50)
    assert (times["steps"], times["lost"], times["waiting"]) == (10, 20, 20)


@pytest.mark.parametrize("recorded", [True, False], ids=["crashed under a launcher", "killed without one"])
@pytest.mark.parametrize(("saved", "lost"), [(0, 30), (10, 20), (30, 0), (None, 0)])
def test_steps_after_the_last_save_are_lost_before_the_run_is_started_again(
    recorded: bool, saved: int | None, lost: int
) -> None:
    """As they are once it is. None: the run still runs, or nobody can say from where it would go on."""
    events = [event(0, 1, "start", step=0), *([event(30, 1, "ranks_ended")] if recorded else [])]
    metrics = [line | {"time": float(line["step"])} for line in steps(1, 1, 30, 1.0)]
    share, times = goodput(events, metrics, now=30, resumes_from=saved)
    assert (times["steps"], times["lost"], share) == (30 - lost, lost, (30 - lost) / 30)
    if saved is not None:
        resumed = [*events, event(50, 2, "resume", step=saved)]
        assert goodput(resumed, metrics, now=50)[1] == times | {"waiting": 20}


@pytest.mark.parametrize("end", ["finish", "stop"])
def test_a_run_that_nobody_launched_is_over_with_its_last_event(end: str) -> None:
    events = [event(0, 1, "launch"), event(0, 1, "start", step=0), event(20, 1, end, step=20)]
    share, _ = goodput(events, steps(1, 1, 20, 1.0), now=1e6)
    assert share == 1.0


def test_no_attempt_has_no_goodput() -> None:
    assert goodput([], [], now=1)[0] is None
