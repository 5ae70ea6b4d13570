"""slurmctld is away while ranks end: that decides nothing. Ranks are stubs; the launcher and SLURM are real."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from launch import control, scheduler
from launch.scheduler import UnreachableError
from mmscale.resilience import lease
from mmscale.runs.events import read_events
from slurm.local.cluster import Cluster
from tests.slurm.jobs import Jobs, Run, shown
from tests.slurm.stub_rank import HOLD

pytestmark = pytest.mark.long

STEPS = "train.steps=20"


@pytest.fixture
def outage(cluster: Cluster) -> Iterator[Callable[[], None]]:
    """Ends slurmctld; it is back after the test."""
    yield cluster.stop_controller
    cluster.restore()


def ended(run: Run) -> list[dict[str, Any]]:
    return [event for event in read_events(run.folder) if event["event"] == "ranks_ended"]


def test_an_outage_when_ranks_end_decides_nothing(jobs: Jobs, cluster: Cluster, outage: Callable[[], None]) -> None:
    """One run loses a rank, one reaches its last step, one is asked to make room, one is stopped by its owner."""
    released = jobs.folder / "released"
    more: dict[str, Any] = {
        "nodes": 1,
        "slow_s": 0.2,
        "stub": True,
        "environment": {f"MMSCALE_{HOLD}": f"7:{released}"},
    }
    crashed = jobs.launch(STEPS, "run.name=crashed", **more)
    finished = jobs.launch(STEPS, "run.name=finished", **more)
    asked = jobs.launch(STEPS, "run.name=asked", **more)
    stopped = jobs.launch("train.steps=4000", "run.name=stopped", **more)
    for run in jobs.runs:
        run.until(lambda run=run: run.step() == 7, f"{run.folder.name} trains")  # type: ignore[misc]
    outage()
    os.kill(crashed.rank(0), signal.SIGKILL)
    os.kill(asked.rank(0), signal.SIGUSR2)
    asked.until(lambda: bool(asked.events("stop")), "it saves", lift=False)
    released.touch()
    for run in jobs.runs[:2]:
        run.until(lambda run=run: bool(ended(run)), f"{run.folder.name} has decided", lift=False)  # type: ignore[misc]
    assert [event["action"] for event in ended(crashed)] == ["retry"]
    assert [event["action"] for event in ended(finished)] == ["end"]
    with pytest.raises(UnreachableError):
        scheduler.job_state(crashed.job, timeout_s=1)
    found = control.stop(stopped.folder)
    assert "through the run folder alone" in found["done"]
    stopped.until(lambda: bool(ended(stopped)), "it stops", lift=False)
    said = shown(finished)
    assert said["state"] == "finished" and said["ended"] and "SLURM does not answer" in said["reason"]
    assert shown(crashed)["state"] == "unknown" and not shown(crashed)["ended"]

    cluster.start_controller()
    for run in (crashed, finished, asked):
        assert run.until_ended().state == "COMPLETED", run.report()
        assert shown(run)["state"] == "finished", run.report()
    assert shown(crashed)["crashes"] == 1 and crashed.state().restarts == 0
    assert [event["action"] for event in ended(asked)] == ["requeue", "end"] and asked.state().restarts == 1
    assert stopped.until_ended().state == "COMPLETED" and shown(stopped)["state"] == "stopped"
    for run in jobs.runs:
        assert lease.owner(run.folder) is None
