"""Jobs that take a run over from one that ended, on a real SLURM: exactly one of them trains. Ranks are stubs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch import chain, control, scheduler
from launch.job_states import Phase
from mmscale.resilience import lease
from mmscale.runs.metrics import METRICS, read_metrics
from mmscale.runtime.rank_env import expand_hostlist
from slurm.local.cluster import Cluster
from tests.slurm.jobs import Jobs, Run, shown
from tests.slurm.stub_rank import FAIL, losses


def numbers(run: Run) -> list[str]:
    return [key.id for _, key in chain.keys(run.folder)]


def states(run: Run) -> list[scheduler.JobState]:
    found = [scheduler.job_state(number) for number in numbers(run)]
    assert all(state is not None for state in found)
    return [state for state in found if state is not None]


def assert_undisturbed(run: Run, steps: int) -> None:
    """Every step once it counts, by one attempt at a time."""
    lines = read_metrics(run.folder)
    assert [line["step"] for line in lines] == list(range(1, steps + 1)), run.report()
    assert [line["loss"] for line in lines] == losses(len(lines))
    attempts = [json.loads(text)["attempt"] for text in (run.folder / METRICS).read_text().splitlines()]
    assert attempts == sorted(attempts)


@pytest.fixture
def cancelling(cluster: Cluster) -> Iterator[Cluster]:
    """Preempted jobs are cancelled at once."""
    partition = ("scontrol", "update", "PartitionName=main")
    cluster.run(*partition, "PreemptMode=CANCEL", "GraceTime=0")
    yield cluster
    cluster.run(*partition, "PreemptMode=REQUEUE", "GraceTime=60")


def test_a_chain_goes_on_where_no_job_comes_back(jobs: Jobs, cancelling: Cluster) -> None:
    """Asked to save where requeue is forbidden; then preempted by cancelling, without a word before it."""
    run = jobs.with_profile(chain=4, requeue=False).launch("train.steps=60", nodes=1, slow_s=0.2, stub=True)
    first, second, third, last = numbers(run)
    assert run.job == first
    run.until(lambda: run.step() >= 3, "the first job trains")
    said = shown(run)
    assert said["job"] == first and [one["job"] for one in said["chain"]] == [first, second, third, last]
    scheduler.cancel(first, signal="USR2", batch_only=True)
    run.until(lambda: run.attempt() >= 2 and run.step() >= 8, "the second job goes on")
    (handed,) = run.events("handed_over")
    assert handed["job"] == second and "disabled" in handed["why"], handed
    assert [event["action"] for event in run.events("ranks_ended")] == ["requeue"]
    cancelling.run("sbatch", "-p", "urgent", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "true")
    run.until(lambda: run.attempt() >= 3, "the third job goes on")
    run.until(lambda: all(state.ended for state in states(run)), "the run ends")
    found = dict(zip(numbers(run), states(run), strict=True))
    assert found[third].state == "COMPLETED" and found[last].state == "CANCELLED", run.report()
    assert found[second].state in ("PREEMPTED", "CANCELLED") and all(state.restarts == 0 for state in found.values())
    assert [event["job"] for event in run.events("launch")] == [first, second, third]
    assert shown(run)["state"] == "finished" and lease.owner(run.folder) is None
    assert_undisturbed(run, 60)


@pytest.mark.long
@pytest.mark.parametrize("lost", [1, pytest.param(0, marks=pytest.mark.exhaustive)])
def test_a_node_dies_where_no_job_comes_back(jobs: Jobs, cluster: Cluster, lost: int) -> None:
    """All processes of a node and its slurmd, with the job's own process (0) or without it."""
    if not cluster.own_names:
        pytest.skip("nodes share the machine's name (not root): nobody can tell whose a process is")
    run = jobs.with_profile(chain=3, requeue=False).launch("train.steps=200", nodes=2, slow_s=0.3, stub=True)
    first, second, last = numbers(run)
    run.until(lambda: run.step() >= 7, "the first job trains")
    node = expand_hostlist(run.state().nodes)[lost]
    try:
        cluster.kill(node)
        run.until(lambda: run.attempt() >= 2, "the second job goes on")
        run.until(lambda: all(state.ended for state in states(run)), "the run ends")
        found = dict(zip(numbers(run), states(run), strict=True))
        assert [found[job].state for job in (first, second, last)] == ["NODE_FAIL", "COMPLETED", "CANCELLED"], (
            run.report()
        )
        assert all(state.restarts == 0 for state in found.values())
        began = run.events("launch")
        assert [event["job"] for event in began] == [first, second]
        assert node not in expand_hostlist(began[1]["nodes"])
        (cordoned,) = run.events("cordoned")
        assert list(cordoned["nodes"]) == [node] and shown(run)["state"] == "finished"
        assert_undisturbed(run, 200)
    finally:
        jobs.end_all()
        cluster.restore()


@pytest.mark.long
@pytest.mark.parametrize(
    ("failure", "end", "state"),
    [
        ("", ("COMPLETED", 0), "stopped"),
        pytest.param("1", ("FAILED", 1), "crashed", marks=pytest.mark.exhaustive),
        ("KILL", ("FAILED", 137), "crashed"),
    ],
)
def test_stop_ends_the_chain(jobs: Jobs, failure: str, end: tuple[str, int], state: str) -> None:
    """It is no success if the save fails."""
    more: dict[str, Any] = {"nodes": 1, "slow_s": 0.2, "stub": True, "environment": {f"MMSCALE_{FAIL}": failure}}
    run = jobs.with_profile(chain=3).launch("train.steps=600", **more)
    run.until(lambda: run.step() >= 3, "it trains")
    done = control.stop(run.folder)["jobs"]
    assert list(done) == numbers(run) and "save" in done[run.job]
    run.until(lambda: all(state.ended for state in states(run)), "all end")
    assert [state.phase for state in states(run)] == [Phase.ENDED] * 3
    assert (states(run)[0].state, states(run)[0].exit_status) == end, run.report()
    assert shown(run)["state"] == state and shown(run)["job"] == run.job
    assert len(run.events("launch")) == 1


@pytest.mark.long
def test_a_save_that_fails_each_time_is_not_requeued_for_ever(jobs: Jobs) -> None:
    more: dict[str, Any] = {"nodes": 1, "slow_s": 0.2, "stub": True, "environment": {f"MMSCALE_{FAIL}": "1"}}
    run = jobs.launch("train.steps=6000", "resilience.max_restarts_without_progress=1", **more)
    for attempt in (1, 2):
        run.until(lambda number=attempt: run.attempt() >= number, f"attempt {attempt} trains")  # type: ignore[misc]
        (run.folder / "stub_failed").unlink(missing_ok=True)  # a stub fails once otherwise
        scheduler.cancel(run.job, signal="USR2", batch_only=True)
    job = run.until_ended()
    assert (job.state, job.exit_status, job.restarts) == ("FAILED", 5, 1), run.report()
    ended = run.events("ranks_ended")
    assert [(event["action"], event["unsaved"], event["over"]) for event in ended] == [
        ("requeue", True, False),
        ("give_up", True, True),
    ]
    (gave_up,) = run.events("gave_up")
    assert gave_up["why"].startswith("ended 2 times in a row without a new checkpoint (there is none)")
    assert "asked to stop by SIGUSR2, but ended with exit status" in gave_up["why"]
    found = shown(run)
    assert found["state"] == "gave up" and gave_up["why"] in found["reason"]


@pytest.mark.long
@pytest.mark.parametrize("ahead", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_a_node_that_is_unfit_after_a_requeue_is_left_out(jobs: Jobs, cluster: Cluster, ahead: int) -> None:
    """Nobody is there when SLURM starts the job again on a node that has broken meanwhile; a spare one is idle."""
    if not cluster.own_names:
        pytest.skip("nodes share one view of the file system (not root)")
    asked = jobs.with_profile(chain=ahead)
    run = asked.launch("train.steps=60", nodes=2, slow_s=0.2, stub=True)
    run.until(lambda: run.step() >= 3, "it trains")
    broken = expand_hostlist(run.state().nodes)[1]
    inside = ["nsenter", f"--target={cluster.slurmd(broken)}", "--mount"]
    subprocess.run([*inside, "mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(run.folder)], check=True)
    try:
        scheduler.cancel(run.job, signal="USR2", batch_only=True)
        run.until(lambda: run.attempt() >= 2 or shown(run)["ended"], "another job goes on")
        run.until(lambda: all(state.ended for state in states(run)), "the run ends")
        (handed,) = run.events("handed_over")
        assert handed["without"] == [broken] and numbers(run) == [run.job, handed["job"]], run.report()
        old, new = states(run)
        assert (old.state, old.exit_status, old.restarts) == ("FAILED", 1, 1) and new.state == "COMPLETED", run.report()
        started = run.events("launch")
        assert [event["job"] for event in started] == [run.job, handed["job"]]
        assert broken not in expand_hostlist(started[-1]["nodes"]) and shown(run)["state"] == "finished"
        assert broken in (jobs.folder / "cordoned.txt").read_text()
        assert_undisturbed(run, 60)
    finally:
        jobs.end_all()
        subprocess.run([*inside, "umount", str(run.folder)], check=True)


@pytest.mark.long
def test_notify_is_told_and_holds_nothing_up(jobs: Jobs) -> None:
    """One notification works, one hangs and one fails: the run does not notice."""
    told = jobs.folder / "told.txt"
    command = f'cat >> {told}; echo "$MMSCALE_KIND" >> {told}.kinds; [ "$MMSCALE_KIND" = start ] && sleep 600; false'
    run = jobs.with_profile(notify=command).launch("train.steps=10", nodes=1, slow_s=0.1, stub=True)
    assert run.until_ended().state == "COMPLETED", run.report()
    assert Path(f"{told}.kinds").read_text().split() == ["start", "finish"]
    start, finish = (json.loads(line) for line in told.read_text().splitlines())
    assert start["run"] == finish["run"] == str(run.folder) and start["job"] == run.job
    assert finish["status"] == 0 and finish["attempt"] == 1
