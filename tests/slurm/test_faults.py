"""What nobody asked for: killed ranks, exceptions, hangs, cancelled jobs, unfit nodes. State after recovery."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import control, scheduler
from launch.profile import load_profile
from mmscale.runs.metrics import read_metrics
from mmscale.runtime.rank_env import expand_hostlist
from slurm.local.cluster import Cluster
from tests.slurm.jobs import Jobs, Run, assert_equal, shown, steps_done_again

pytestmark = pytest.mark.long


def test_a_killed_rank_ends_all_and_the_run_goes_on_by_itself(jobs: Jobs, reference: list[dict[str, Any]]) -> None:
    run = jobs.launch(slow_s=0.0, faults="1:*:begin:slow=0.15")
    run.until_step(13)
    os.kill(run.rank(1), signal.SIGKILL)
    killed = time.time()
    ended = run.until_ended()
    assert ended.state == "COMPLETED" and ended.restarts == 0, run.report()
    (first, _) = run.events("ranks_ended")
    # Its own status, although srun ends with 143 if it has ended the other rank.
    assert (first["status"], first["failed"]["ranks"], first["action"]) == (137, "1", "retry"), run.report()
    assert first["time"] - killed < 300 and run.events("hang") == []  # its exit is noticed, not its silence
    (resume,) = run.events("resume")
    assert resume["step"] == max(event["step"] for event in run.events("save_committed") if event["attempt"] == 1)
    assert steps_done_again(run) <= 10  # steps since the last committed save, which comes every ten
    assert_equal(run, reference)
    found = shown(run)
    assert found["crashes"] == 1
    # Rank 1 was slow all the time, although both end each step together.
    lines = read_metrics(run.folder)
    assert sorted(line["slowest_rank"] for line in lines)[len(lines) // 2] == 1
    assert sorted(line["rank_time_max_s"] - line["rank_time_median_s"] for line in lines)[len(lines) // 2] > 0.1
    over = lines[-1]["rank_time_max_s"] / lines[-1]["rank_time_median_s"] - 1
    assert found["slowest_rank"] == {"rank": lines[-1]["slowest_rank"], "over_median": round(over, 3)}
    assert re.search(r"rank 1 \+\d+%", (run.folder / "logs" / "attempt_2" / "rank_0.log").read_text())


@pytest.mark.exhaustive
def test_a_kill_during_a_save_leaves_the_checkpoint_before_it(jobs: Jobs, reference: list[dict[str, Any]]) -> None:
    run = jobs.launch(slow_s=0.02, faults="1:20:write:kill")
    run.until(lambda: bool(run.events("ranks_ended")), "a rank is killed in its save")
    assert run.checkpoints() == [10]
    scheduler.cancel(run.job, signal="USR1", batch_only=True)  # the fault would come again at the same place
    ended = run.until_ended()
    assert ended.exit_status in (0, 5, 137)  # the last: if the request came while it was killed again
    assert [event["step"] for event in run.events("resume")][:1] in ([10], [])
    assert 20 not in [event["step"] for event in run.events("save_committed")]


def test_the_same_exception_in_every_attempt_ends_with_status_5_and_says_why(jobs: Jobs) -> None:
    run = jobs.launch("resilience.max_restarts_without_progress=1", nodes=1, slow_s=0.0, faults="0:13:step:EIO")
    ended = run.until_ended()
    assert (ended.state, ended.exit_status) == ("FAILED", 5), run.report()
    # The first attempt commits step 10; the second and the third only repeat what follows.
    assert [event["action"] for event in run.events("ranks_ended")] == ["retry", "retry", "give_up"]
    (gave_up,) = run.events("gave_up")
    assert "ended 2 times in a row without a new checkpoint (the newest is of step 10)" in gave_up["why"]
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


@pytest.mark.parametrize("ranks", ["srun", pytest.param("torchrun", marks=pytest.mark.exhaustive)])
def test_a_rank_that_sleeps_for_ever_is_named_and_the_run_goes_on(
    jobs: Jobs, ranks: str, reference: list[dict[str, Any]]
) -> None:
    agents = ranks == "torchrun"
    run = jobs.with_profile(ranks=ranks).launch("resilience.hang_timeout=5s")
    run.until_step(13)
    rank = run.rank(1, below_agent=agents)
    os.kill(rank, signal.SIGSTOP)
    run.until(lambda: run.attempt() == 2 if agents else bool(run.events("hang")), "the hang is noticed")
    assert run.until_ended().state == "COMPLETED", run.report()
    (hang,) = run.events("hang")
    assert hang["ranks"] == [1] and hang["waited_s"] >= 5 and hang["attempt"] == 1
    flight = json.loads((run.folder / "logs" / "attempt_1" / "hang" / "flight_0.json").read_text())
    # Where rank 0 stood. Which collective it is depends on the moment at which the other rank was stopped.
    assert flight["entries"][-1]["profiling_name"].startswith("gloo:")
    assert "stacks of rank 0" in (run.folder / "logs" / "attempt_1" / "rank_0.log").read_text()
    actions = [event["action"] for event in run.events("ranks_ended")]
    assert actions == ["in_place" if agents else "retry", "end"]
    assert_equal(run, reference)


def test_a_node_that_is_not_fit_is_left_out_before_ranks_start(jobs: Jobs, cluster: Cluster) -> None:
    """The run folder is read-only on one node alone, in its own mount namespace."""
    if not cluster.own_names:
        pytest.skip("nodes share one view of the file system (not root)")
    folder = jobs.folder / "tiny"
    folder.mkdir()
    content = yaml.safe_load(jobs.profile.read_text()) | {"replacements": 0}
    profile = jobs.folder / "waits.yaml"  # for a person; test_successors.py has those that go on by themselves
    profile.write_text(yaml.safe_dump(content))
    on_n2 = ["nsenter", f"--target={cluster.slurmd('n2')}", "--mount"]
    subprocess.run([*on_n2, "mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], check=True)
    try:
        asked = dataclasses.replace(jobs, profile=profile, runs=jobs.runs)
        run = asked.launch("train.steps=4", "checkpoint.every=0", slow_s=0.0)
        ended = run.until_ended()
        assert (ended.state, ended.exit_status) == ("FAILED", 1), run.report()
        assert shown(run)["state"] == "unfit nodes" and run.events("launch") == []
        (failed,) = run.events("preflight_failed")
        assert list(failed["nodes"]) == ["n2"] and "run_folder: " in failed["nodes"]["n2"]
        assert "Read-only file system" in failed["nodes"]["n2"]
        again = Run(folder, control.resume(folder)["job"], cluster)
        jobs.runs.append(again)
        assert again.until_ended().state == "COMPLETED", again.report()
        (started,) = run.events("launch")
        assert expand_hostlist(started["nodes"]) == ["n1", "n3"]
        log = next(run.folder.glob("launch/001/submitit/*_log.out")).read_text()
        assert "#SBATCH --exclude=n2" in log and "node n1: ready" in log
        assert f"leaves nodes of {load_profile(str(jobs.profile)).cordon_file} out" in log
        assert load_profile(str(jobs.profile)).excluded() == ["n2"]
    finally:
        Path(load_profile(str(jobs.profile)).cordon_file or "").unlink(missing_ok=True)
        jobs.end_all()
        subprocess.run([*on_n2, "umount", str(folder)], check=True)


def test_torchrun_starts_ranks_again_in_place(jobs: Jobs, reference: list[dict[str, Any]]) -> None:
    """One agent per node: a killed rank costs no new step of SLURM; SIGTERM of a preemption passes the agents by.

    SLURM is away when the rank dies. Before it, what an all-reduce between the nodes moves is measured.
    """
    checks = {"all_reduce_mb": 4, "all_reduce_between_gb_s": 1e-6}
    content = yaml.safe_load(jobs.profile.read_text()) | {"ranks": "torchrun", "preflight": checks}
    profile = jobs.folder / "agents.yaml"
    profile.write_text(yaml.safe_dump(content))
    temporary = {"TMPDIR": str(jobs.folder / "node")}
    Path(temporary["TMPDIR"]).mkdir()
    asked = dataclasses.replace(jobs, profile=profile, runs=jobs.runs)
    run = asked.launch(slow_s=0.2, hold_after=22, environment=temporary)
    run.until_step(13)
    jobs.cluster.stop_controller()
    os.kill(run.rank(1, below_agent=True), signal.SIGKILL)
    killed = time.time()
    run.until(lambda: run.step() >= 15 and run.attempt() == 2, "ranks are started again in place", lift=False)
    jobs.cluster.start_controller()
    urgent = ("sbatch", "--parsable", "-p", "urgent", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "true")
    jobs.cluster.run(*urgent)
    run.until(lambda: "PreemptTime=2" in jobs.cluster.run("scontrol", "show", "job", run.job), "it is preempted")
    asked.go_on()
    run.until(lambda: run.state().restarts == 1, "it is requeued")
    assert run.until_ended().state == "COMPLETED", run.report()
    (stop,) = run.events("stop")
    assert stop["signal"] == "SIGTERM"  # and torchrun counted no 30 s from it
    agents = [file.read_text() for file in sorted((run.folder / "logs" / "attempt_1").glob("agent_*.log"))]
    # An agent may end its rank with SIGTERM when it starts the ranks again, but gets none itself.
    assert len(agents) == 2 and not any("death signal" in text or "SignalException" in text for text in agents), agents
    launches = run.events("launch")
    assert [event.get("in_place", False) for event in launches] == [False, True, False], run.report()
    measured = launches[0]["all_reduce_gb_s"]
    assert list(measured["between"]) == ["n1-n2"] and measured["inside"] == {} and measured["all"] > 0
    assert launches[0]["attempt_id"] == launches[1]["attempt_id"] != launches[2]["attempt_id"]
    ended = run.events("ranks_ended")
    assert [(event["attempt"], event["action"]) for event in ended] == [(1, "in_place"), (2, "requeue"), (3, "end")]
    assert (ended[0]["failed"]["ranks"], ended[0]["failed"]["status"]) == ("1", 137)
    assert ended[1]["status"] == 75  # which torchrun knows nothing of
    first, second = run.events("resume")
    assert first["step"] == 10 and launches[1]["time"] - killed < 300
    assert run.events("hang") == []  # its exit is noticed, not its silence
    assert second["step"] == stop["step"]
    assert steps_done_again(run) <= 10
    assert_equal(run, reference)
    found = shown(run)
    assert found["crashes"] == 1 and found["restarts"] == 2
    assert "step 15/60" in (run.folder / "logs" / "attempt_1" / "rank_0.log").read_text()
    assert [file.name for file in Path(temporary["TMPDIR"]).glob("torchelastic_*")] == []
