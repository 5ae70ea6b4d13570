"""A stage of a run as a job: its rank is killed, it is preempted and stopped, and it ends with the same numbers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch import control
from mmscale.runs.metrics import read_metrics
from tests.slurm.jobs import ROOT, Jobs, Run, assert_equal, shown, steps_done_again
from tests.slurm.stub_rank import HOLD

STEPS = 40
SETTINGS = (
    "train.steps=10",
    f"auxiliary.steps={STEPS}",
    "auxiliary.checkpoint_every=10",
    "auxiliary.calibration_batches=2",
)


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of the main stage alone, `before`, and with the auxiliary stage behind it, `after`; without SLURM."""
    runs = tmp_path_factory.mktemp("undisturbed")

    def train(*arguments: str) -> None:
        command = [sys.executable, "-m", "mmscale", "train", str(config), f"run.dir={runs / 'after'}", *SETTINGS]
        ended = subprocess.run(
            [*command, *arguments, "--nproc", "2"], cwd=ROOT, capture_output=True, text=True, timeout=400
        )
        assert ended.returncode == 0, ended.stderr

    train()
    shutil.copytree(runs / "after", runs / "before")
    train("--stage", "auxiliary")
    return runs


def test_a_stage_waits_for_the_run_and_is_shown_and_stopped(jobs: Jobs) -> None:
    """Ranks are stubs; the run and its stage have folders, jobs and states of their own."""
    few = ("train.steps=3", "auxiliary.steps=20")
    main = jobs.launch(*few, nodes=1, slow_s=0.0, stub=True)
    held = {f"MMSCALE_{HOLD}": f"6:{jobs.folder / 'on'}"}
    run = jobs.launch(*few, nodes=1, slow_s=0.0, stub=True, stage="auxiliary", after=str(main.folder), environment=held)
    assert run.folder == main.folder / "auxiliary"
    run.until(lambda: run.step() == 6, "it is held")
    assert main.state().state == "COMPLETED" and [line["step"] for line in read_metrics(main.folder)] == [1, 2, 3]
    found = shown(run)
    assert (found["state"], found["step"], found["steps"]) == ("RUNNING", 6, 20), found
    control.stop(run.folder)
    assert run.until_ended().state == "COMPLETED" and shown(run)["state"] == "stopped", run.report()
    assert shown(main)["state"] == "finished"
    assert [event["step"] for event in run.events("start", "stop", "finish")] == [0, 6]
    assert [event["action"] for event in run.events("ranks_ended")] == ["end"]


@pytest.mark.exhaustive
def test_killed_preempted_stopped_and_resumed(jobs: Jobs, undisturbed: Path) -> None:
    shutil.copytree(undisturbed / "before" / "tiny", jobs.folder / "tiny")
    run = jobs.launch(*SETTINGS, slow_s=0.1, stage="auxiliary")
    assert run.folder == (jobs.folder / "tiny" / "auxiliary").absolute()
    run.until_step(13)
    os.kill(run.rank(1), signal.SIGKILL)
    run.until_step(15, attempt=2)
    urgent = ("sbatch", "--parsable", "-p", "urgent", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "true")
    jobs.cluster.run(*urgent)
    run.until(lambda: run.state().restarts == 1, "it is requeued")
    run.until_step(run.step() + 2, attempt=3)
    assert shown(run)["steps"] == STEPS
    control.stop(run.folder)
    assert run.until_ended().state == "COMPLETED" and shown(run)["state"] == "stopped", run.report()
    again = Run(run.folder, control.resume(run.folder)["job"], jobs.cluster)
    jobs.runs.append(again)
    assert again.until_ended().state == "COMPLETED", again.report()
    whole = undisturbed / "after" / "tiny" / "auxiliary"
    assert_equal(again, read_metrics(whole))
    assert json.loads((run.folder / "report.json").read_text()) == json.loads((whole / "report.json").read_text())
    assert steps_done_again(again) <= 10  # steps since the last save, when the rank was killed
    found = shown(again)
    assert found["state"] == "finished" and found["step"] == found["steps"] == STEPS and found["crashes"] == 0
    actions = [event["action"] for event in run.events("ranks_ended")]
    assert actions == ["retry", "requeue", "end", "end"], again.report()
