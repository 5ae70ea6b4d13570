"""What nobody asked for: killed ranks, exceptions, cancelled jobs, dead and half-dead nodes. State after recovery."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from launch import scheduler
from mmscale.checkpoint.layout import Store
from mmscale.train.metrics import METRICS
from slurm.local_cluster import Cluster
from tests.slurm.jobs import Jobs, assert_equal, shown, steps_done_again


def test_a_killed_rank_ends_all_and_the_run_goes_on_by_itself(jobs: Jobs, reference: list[dict[str, Any]]) -> None:
    run = jobs.launch()
    run.until_step(13)
    os.kill(run.rank(1), signal.SIGKILL)
    killed = time.time()
    ended = run.until_ended()
    assert ended.state == "COMPLETED" and ended.restarts == 0, run.report()
    (first, _) = run.events("ranks_ended")
    assert first["status"] == 137 and first["action"] == "retry"
    assert first["time"] - killed < 30
    (resume,) = run.events("resume")
    assert resume["step"] == max(event["step"] for event in run.events("save_committed") if event["attempt"] == 1)
    assert steps_done_again(run) <= 10  # steps since the last committed save, which comes every ten
    assert_equal(run, reference)
    assert shown(run)["crashes"] == 1


def test_a_kill_during_a_save_leaves_the_checkpoint_before_it(jobs: Jobs, reference: list[dict[str, Any]]) -> None:
    run = jobs.launch(slow_s=0.02, faults="1:20:write:kill")
    run.until(lambda: bool(run.events("ranks_ended")), "a rank is killed in its save")
    assert run.checkpoints() == [10]
    scheduler.cancel(run.job, signal="USR1", batch_only=True)  # the fault would come again at the same place
    ended = run.until_ended()
    assert ended.exit_status in (75, 5)
    assert [event["step"] for event in run.events("resume")][:1] in ([10], [])
    assert 20 not in [event["step"] for event in run.events("save_committed")]


def test_the_same_exception_in_every_attempt_ends_with_status_5_and_says_why(jobs: Jobs) -> None:
    run = jobs.launch("resilience.max_restarts_without_progress=1", nodes=1, slow_s=0.0, faults="0:13:step:EIO")
    ended = run.until_ended()
    assert (ended.state, ended.exit_status) == ("FAILED", 5), run.report()
    # The first attempt commits step 10; the second and the third only repeat what follows.
    assert [event["action"] for event in run.events("ranks_ended")] == ["retry", "retry", "give_up"]
    (gave_up,) = run.events("gave_up")
    assert "2 times in a row without a new checkpoint (the newest is of step 10)" in gave_up["why"]
    found = shown(run)
    assert found["state"] == "gave up" and found["crashes"] == 3 and found["reason"] == gave_up["why"]


def test_a_cancelled_job_saves_and_does_not_come_back(jobs: Jobs) -> None:
    run = jobs.launch(slow_s=0.15)
    run.until_step(5)
    scheduler.cancel(run.job)
    run.until_ended()
    run.until(lambda: bool(run.events("ranks_ended")), "the job has said its last word")
    (stop,) = run.events("stop")
    assert run.checkpoints() == [stop["step"]]
    assert run.state().state == "CANCELLED" and run.state().restarts == 0
    assert len(run.events("launch")) == 1
    assert shown(run)["state"] == "stopped"


@pytest.mark.slow
def test_half_dead_node_is_fenced_out_and_the_run_goes_on_elsewhere(
    jobs: Jobs, cluster: Cluster, reference: list[dict[str, Any]]
) -> None:
    """slurmd dies and its ranks do not: SLURM starts the job elsewhere while the old attempt still trains."""
    run = jobs.launch("train.steps=4000", "checkpoint.every=20", nodes=1, slow_s=0.1)
    run.until_step(5)
    node = run.state().nodes
    old = run.rank(0)
    os.kill(cluster.slurmd(node), signal.SIGKILL)
    try:
        run.until(lambda: run.attempt() >= 2, "the next attempt trains")
        assert run.state().nodes != node
        run.until(lambda: not Path(f"/proc/{old}").exists() or _zombie(old), "the old rank ends by itself")
        starts = run.events("launch")
        assert [event["attempt"] for event in starts] == [1, 2]
        run.until(lambda: run.events("save_committed")[-1]["attempt"] == 2, "the new attempt saves")
        # Not a line, an event or a checkpoint of the old attempt after the new one has begun.
        lines = (run.folder / METRICS).read_text().splitlines()
        attempts = ["2" if '"attempt": 2' in line else "1" for line in lines]
        assert attempts == sorted(attempts)
        later = [event for event in run.events() if event["time"] > starts[1]["time"]]
        assert later and all(event["attempt"] == 2 for event in later), later
        info = Store.of_run(run.folder)
        assert info.info(info.steps()[-1])["attempt"] == 2
    finally:
        jobs.end_all()
        cluster.restore()


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
