"""What a job gets of the shell that launches it, on a real SLURM; and ranks that never meet. Ranks are stubs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from launch import control, job_environment
from launch import record as records
from mmscale.plan.cluster_load import LAUNCH_FILES
from tests.slurm.jobs import Jobs, shown
from tests.slurm.stub_rank import DEAF, ENVIRONMENT

FEW = "train.steps=3"


def test_module_works_in_setup_and_secrets_reach_ranks(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """`module` is a function that the shell exports; `module load` is what the schema gives as an example."""
    monkeypatch.setenv("WANDB_API_KEY", "not-in-any-record-4711")
    secrets = {"WANDB_API_KEY": {"env": "WANDB_API_KEY"}}
    shell = {"BASH_FUNC_module%%": '() {  export LOADED="$2"\n}', "PYTHONPATH": "/of/the/user", "HF_HOME": "/hf"}
    asked = jobs.with_profile(setup=["module load cuda"], secrets=secrets)
    run = asked.launch(FEW, nodes=1, stub=True, environment=shell)
    assert run.until_ended().state == "COMPLETED", run.report()
    seen = json.loads((run.folder / ENVIRONMENT).read_text())
    assert (seen["LOADED"], seen["HF_HOME"], seen["WANDB_API_KEY"]) == ("cuda", "/hf", os.environ["WANDB_API_KEY"])
    code = records.latest(run.folder)
    assert seen["PYTHONPATH"] == f"{code}/code.zip:/of/the/user"
    files = [file for file in run.folder.rglob("*") if file.is_file() and file.name != ENVIRONMENT]
    assert not [file for file in files if b"4711" in file.read_bytes()]  # the job has removed its secrets at its end
    assert not (Path(str(code)) / job_environment.SECRETS).exists()
    left = [file.name for file in Path(str(code)).rglob("*") if file.is_file()]
    assert len(left) == LAUNCH_FILES, left


@pytest.mark.long
def test_setup_that_fails_is_no_run_that_trains(jobs: Jobs) -> None:
    run = jobs.with_profile(setup=["module load cuda"]).launch(FEW, nodes=1, stub=True)
    ended = run.until_ended()
    assert (ended.state, ended.exit_status) == ("FAILED", 2), run.report()
    assert shown(run)["state"] == "failed" and run.events() == []
    assert "error: setup of the profile failed" in next(run.folder.glob("launch/001/submitit/*_log.out")).read_text()


@pytest.mark.long
def test_ranks_that_never_meet_are_said_not_to_and_stop_is_heard(jobs: Jobs) -> None:
    asked = jobs.with_profile(start_hint_after="4s")
    run = asked.launch(FEW, nodes=1, stub=True, environment={f"MMSCALE_{DEAF}": "1"})
    run.until(lambda: bool(run.events("not_begun")), "it is noticed")
    (event,) = run.events("not_begun")
    assert "no rank has begun; ranks meet at " in event["why"]
    found = shown(run)
    assert found["state"] == "RUNNING" and found["reason"] == event["why"]
    control.stop(run.folder)
    asked_at = time.monotonic()
    ended = run.until_ended()
    assert time.monotonic() - asked_at < 60
    assert ended.state == "COMPLETED" and shown(run)["state"] == "stopped", run.report()
    assert [event["action"] for event in run.events("ranks_ended")] == ["end"]
