"""One run through every kind of interruption that leaves time to save: no step is lost, and no number differs.

SIGUSR2, `scontrol requeue` by somebody else, preemption, `mmscale stop` and `resume`: four ends, five starts.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launch import control, scheduler
from mmscale.runtime.rank_env import port_of_job
from slurm.local.cluster import Cluster
from tests.slurm.conftest import STEPS
from tests.slurm.jobs import Jobs, Run, assert_equal, shown, steps_done_again

pytestmark = pytest.mark.long


@dataclass(frozen=True)
class Story:
    """What was seen on the way."""

    run: Run
    restarts: list[int]  # SLURM's count after each requeue
    stopped: scheduler.JobState
    shown_stopped: dict[str, Any]
    resumed: dict[str, Any]
    ended: scheduler.JobState


@pytest.fixture(scope="module")
def story(cluster: Cluster, config: Path, profile: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    jobs = Jobs(cluster, config, profile, tmp_path_factory.mktemp("interrupted"))
    run = jobs.launch(slow_s=0.15)
    taken = _listeners(run.job)
    restarts = []

    def running_again(restarted: int) -> None:
        run.until(lambda: run.state().restarts >= restarted, f"restart {restarted}")
        restarts.append(run.state().restarts)

    run.until_step(6)
    scheduler.cancel(run.job, signal="USR2")  # to the ranks, as a user or a site's script does
    running_again(1)
    run.until_step(run.step() + 3, attempt=2)
    scheduler.requeue(run.job)
    running_again(2)
    run.until_step(run.step() + 3, attempt=3)
    urgent = cluster.run(
        "sbatch", "--parsable", "-p", "urgent", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "true"
    )
    running_again(3)
    run.until(lambda: scheduler.job_state(urgent.strip()).ended, "the urgent job has run")  # type: ignore[union-attr]
    run.until_step(run.step() + 3, attempt=4)
    control.stop(run.folder)
    stopped = run.until_ended()
    shown_stopped = shown(run)
    resumed = control.resume(run.folder)
    again = Run(run.folder, resumed["job"], cluster)
    jobs.runs.append(again)
    ended = again.until_ended()
    for listener in taken:
        listener.close()
    yield Story(again, restarts, stopped, shown_stopped, resumed, ended)
    jobs.end_all()


def _listeners(job: str) -> list[socket.socket]:
    """Somebody else on the ports that ranks of this job's steps would take if nobody told them another one.

    A rank of the start before that has not ended yet is such a somebody: ranks of the next start then crashed.
    """
    listeners = []
    for step in range(4):
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listeners.append(listener)
        with contextlib.suppress(OSError):  # somebody else is there already
            listener.bind(("", port_of_job(int(job), step=step)))
            listener.listen()
    return listeners


def test_every_number_is_that_of_an_uninterrupted_run(story: Story, reference: list[dict[str, Any]]) -> None:
    assert story.ended.state == "COMPLETED", story.run.report()
    assert_equal(story.run, reference)


def test_no_step_is_done_twice(story: Story) -> None:
    assert steps_done_again(story.run) == 0


def test_each_interruption_requeues_once(story: Story) -> None:
    assert story.restarts == [1, 2, 3]
    starts = story.run.events("launch")
    assert [event["restart"] for event in starts] == [0, 1, 2, 3, 0], story.run.report()
    assert len({event["attempt_id"] for event in starts}) == 5
    requeued = [event["attempt"] for event in story.run.events("ranks_ended") if event["action"] == "requeue"]
    assert 1 in requeued and 2 not in requeued  # somebody else requeued the second one


def test_every_end_was_a_committed_save(story: Story) -> None:
    stops = story.run.events("stop")
    assert [event["attempt"] for event in stops] == [1, 2, 3, 4]
    saved = [event["step"] for event in story.run.events("save_committed")]
    resumes = story.run.events("resume")
    for stop, resume in zip(stops, resumes, strict=True):
        assert stop["step"] in saved
        assert resume["step"] == stop["step"] and resume["attempt"] == stop["attempt"] + 1


def test_a_stopped_run_stays_away_and_says_so(story: Story) -> None:
    assert story.stopped.state == "COMPLETED"  # no failure for SLURM and its mail
    assert story.stopped.restarts == 3
    assert story.shown_stopped["state"] == "stopped" and story.shown_stopped["ended"]


def test_status_of_the_finished_run(story: Story) -> None:
    found = shown(story.run)
    assert found["state"] == "finished" and found["step"] == found["steps"] == STEPS
    assert found["attempt"] == 5 and found["crashes"] == 0
    assert found["restarts"] == 3  # `resume` was asked for
    assert found["last_checkpoint"] == STEPS
    assert set(found["loss"]) == {"text", "image"}
    events = story.run.events()
    allocated = sum(found["time"].values()) - found["time"]["waiting"]
    assert found["goodput"] == pytest.approx(found["time"]["steps"] / allocated, abs=0.01)
    assert events[0]["since"] < events[0]["time"]  # the nodes were examined
    assert sum(found["time"].values()) == pytest.approx(events[-1]["time"] - events[0]["since"], abs=0.5)


def test_it_ran_the_snapshot_of_the_code(story: Story) -> None:
    assert {event["launch"] for event in story.run.events("launch")} == {"001", "002"}
    # The ranks of the last launch wrote it.
    environment = json.loads((story.run.folder / "environment.json").read_text())
    assert environment["code"] == str(story.run.folder / "launch" / "002" / "code.zip")
