"""One run that is preempted at random moments: while it starts, while it trains, while it saves; it ends with the same
numbers, and what it wrote down of itself adds up.

It found that SLURM's SIGTERM is lost on a job that has no step yet (it trained on through its time of grace), and ends
the check of its nodes (which passed for unfit).

The suite does two, `make preempted` twenty (MMSCALE_PREEMPTIONS); MMSCALE_SEED repeats what a failure printed.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from launch import scheduler
from mmscale.runs.events import read_events
from mmscale.runs.metrics import METRICS
from slurm.local.cluster import Cluster
from tests.slurm.jobs import Jobs, Run, assert_equal, shown, steps_done_again

COUNT = int(os.environ.get("MMSCALE_PREEMPTIONS", "2"))
SEED = int(os.environ.get("MMSCALE_SEED", "0")) or random.SystemRandom().randrange(1, 1_000_000)
# A site's choice: SIGTERM, which is all that SLURM sends by itself; or the job's own signal, to the batch script alone.
SIGNALS: tuple[tuple[str, ...], ...] = ((), ("SlurmctldParameters=preempt_send_user_signal",))


@pytest.fixture
def configurable(cluster: Cluster) -> Iterator[Cluster]:
    yield cluster
    cluster.configure()


@pytest.mark.exhaustive
def test_preemptions_at_random_moments(jobs: Jobs, configurable: Cluster, reference: list[dict[str, Any]]) -> None:
    moments = random.Random(SEED)
    run = jobs.launch(slow_s=0.3)
    said = [f"seed {SEED}"]
    for number in range(COUNT):
        configurable.configure(*SIGNALS[number % 2])
        said.append(_wait_for_a_moment(run, number, moments))
        sys.stderr.write(f"{said[-1]}\n")
        urgent = _preempt(configurable)
        run.until(lambda before=number: run.state().restarts > before, f"preemption {number + 1}")  # type: ignore[misc]
        assert run.state().restarts == number + 1, (said, run.report())
        run.until(lambda name=urgent: scheduler.job_state(name).ended, "the urgent job has run")  # type: ignore[misc,union-attr]
    assert run.until_ended().state == "COMPLETED", (said, run.report())
    assert run.state().restarts == COUNT, (said, run.report())
    assert steps_done_again(run) == 0, (said, run.report())
    assert_equal(run, reference)
    _assert_events_and_metrics_agree(run, said)
    found = shown(run)
    assert found["crashes"] == 0, (said, run.report())
    assert found["goodput"] == pytest.approx(_goodput(run), abs=0.01), said
    assert sum(found["time"].values()) == pytest.approx(_allocated(run) + found["time"]["waiting"], abs=0.5)


def _wait_for_a_moment(run: Run, number: int, moments: random.Random) -> str:
    """Some seconds after a start of the job, or after some steps of it; the first time at once."""
    run.until(lambda: run.state().state == "RUNNING", f"start {number + 1}")
    if number == 0 or moments.random() < 0.5:
        seconds = moments.uniform(0.0, 10.0) if number else 0.0
        time.sleep(seconds)
        return f"preemption {number + 1}: {seconds:.1f} s after a start"
    steps = moments.randint(1, 2)
    run.until_step(run.step() + steps)
    return f"preemption {number + 1}: {steps} steps after a start"


def _preempt(cluster: Cluster) -> str:
    command = ("sbatch", "--parsable", "-p", "urgent", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "true")
    return cluster.run(*command).strip()


def _assert_events_and_metrics_agree(run: Run, said: Sequence[str]) -> None:
    """Every attempt: launched, perhaps begun, ended; its lines are the steps between where it began and stopped."""
    events, lines = read_events(run.folder), _lines(run)
    for attempt in sorted({event["attempt"] for event in events}):
        mine = [event for event in events if event["attempt"] == attempt]
        names = [event["event"] for event in mine]
        assert names[0] == "launch" and names.count("launch") == 1, (said, names)
        assert names[-1] == "ranks_ended" and names.count("ranks_ended") == 1, (said, names)
        steps = [line["step"] for line in lines if line["attempt"] == attempt]
        begun = [event["step"] for event in mine if event["event"] in ("start", "resume")]
        ended = [event["step"] for event in mine if event["event"] in ("stop", "finish")]
        if not begun:
            assert steps == [] and ended == [], (said, names)
            continue
        assert len(begun) == len(ended) == 1, (said, names)
        assert steps == list(range(begun[0] + 1, ended[0] + 1)), (said, names)
        saved = [event["step"] for event in mine if event["event"] == "save_committed"]
        assert ended[0] == begun[0] or ended[0] in saved, (said, names)


def _lines(run: Run) -> list[dict[str, Any]]:
    found = [json.loads(text) for text in (run.folder / METRICS).read_text().splitlines()]
    return [line for line in found if "loss" in line]


def _attempts(run: Run) -> list[tuple[float, float]]:
    """Begin and end of each attempt, by its events."""
    events = read_events(run.folder)
    found = []
    for attempt in sorted({event["attempt"] for event in events}):
        mine = [event for event in events if event["attempt"] == attempt]
        launched = next(event for event in mine if event["event"] == "launch")
        found.append((launched.get("since", launched["time"]), max(event["time"] for event in mine)))
    return found


def _allocated(run: Run) -> float:
    return sum(end - begin for begin, end in _attempts(run))


def _goodput(run: Run) -> float:
    """Every step was done once, and each one's time is on its own line."""
    return sum(line["step_time_s"] for line in _lines(run)) / _allocated(run)
