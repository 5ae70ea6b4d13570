"""`mmscale launch` without a cluster: a stage through a kill, and `--from-scratch` through a restart of its job."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmscale.checkpoint.layout import Store
from mmscale.resilience.inject import VARIABLE
from mmscale.runs.events import read_events
from mmscale.runs.metrics import read_metrics
from tests.end_to_end.running import ROOT, Started, assert_says, listing, mmscale, start

STEPS = 8
SETTINGS = (
    f"train.steps={STEPS}",
    f"auxiliary.steps={STEPS}",
    "auxiliary.calibration_batches=1",
    "auxiliary.checkpoint_every=2",
    "checkpoint.every=2",
    "checkpoint.asynchronous=false",
    "train.eval_every=0",
    "train.eval_batches=1",
    "parallel.ep=1",
)
EXACT = ("loss", "grad_norm", "lr", "tokens")
SLOW = {VARIABLE: "*:*:step:slow=0.1"}


def numbers(folder: Path) -> dict[int, dict[str, Any]]:
    return {line["step"]: {key: line[key] for key in EXACT} for line in read_metrics(folder)}


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in read_events(folder) if event["event"] == name]


def until_step(command: Started, folder: Path, step: int, *, attempt: int) -> None:
    command.until(
        lambda: any(m["step"] >= step and m["attempt"] >= attempt for m in read_metrics(folder)), timeout_s=300.0
    )


def the_rank(command: Started) -> int:
    """The only rank below a launcher."""
    (pid,) = (pid for pid in command.processes() if b"train" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"))
    return pid


@pytest.fixture(scope="module")
def main_run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished main run of one rank; to be copied."""
    runs = tmp_path_factory.mktemp("main")
    ended = mmscale("train", config, f"run.dir={runs}", *SETTINGS)
    assert ended.status == 0, ended
    return runs / "tiny"


@pytest.mark.long
def test_a_stage_goes_on_after_a_kill(config: Path, digits: Path, main_run: Path, tmp_path: Path) -> None:
    """It ends with the numbers of an undisturbed one, validation set included; injected faults are an event."""
    runs = {name: tmp_path / name for name in ("whole", "killed")}
    for folder in runs.values():
        shutil.copytree(main_run, folder / "tiny")
    arguments = (*SETTINGS, f"data.validation.web={digits}", "--stage", "auxiliary")
    profile = "log.profile={start: 2, steps: 5}"
    ended = mmscale("train", config, f"run.dir={runs['whole']}", *arguments)
    assert ended.status == 0, ended
    command = start("launch", config, f"run.dir={runs['killed']}", *arguments, profile, environ=SLOW)
    whole, stage = (folder / "tiny" / "auxiliary" for folder in runs.values())
    try:
        until_step(command, stage, 3, attempt=1)
        os.kill(the_rank(command), signal.SIGKILL)
        ended = command.end(timeout_s=300.0)
    finally:
        command.process.kill()
        command.process.wait()
    assert ended.status == 0, ended
    assert "this run trains on this machine; --cluster NAME submits it to SLURM" in ended.err
    assert numbers(stage) == numbers(whole) and sorted(numbers(stage)) == list(range(1, STEPS + 1))
    reports = [json.loads((folder / "report.json").read_text()) for folder in (stage, whole)]
    assert reports[0] == reports[1] and reports[0]["validation"]["web"] == reports[0]["held_out"]
    assert [event["action"] for event in events(stage, "ranks_ended")] == ["retry", "end"]
    resumed = events(stage, "resume")[0]["step"]
    assert resumed in (2, 4)
    traces = [file.name for file in (stage / "profile").iterdir()]  # the killed attempt has written none
    assert traces == [f"attempt_2_rank_0_steps_{resumed + 1}-6.json.gz"]
    asked = events(stage, "faults_requested")
    assert [(event["attempt"], event["faults"]) for event in asked] == [(1, SLOW[VARIABLE]), (2, SLOW[VARIABLE])]
    assert not events(whole, "faults_requested")


@pytest.mark.long
def test_lost_checkpoints_are_given_up_once(config: Path, main_run: Path, tmp_path: Path) -> None:
    """By the first start of a job; one that is started again goes on from its own checkpoints, or refuses."""
    undisturbed = numbers(main_run)
    run = Path(shutil.copytree(main_run, tmp_path / "tiny"))
    shutil.rmtree(run / "checkpoints")
    settings = (f"run.dir={tmp_path}", *SETTINGS)
    before = listing(run)
    for command in (("train",), ("launch",), ("launch", "--dry-run")):
        refused = mmscale(command[0], config, *settings, *command[1:])
        assert_says(refused, status=4, cause=f"says that step {STEPS} was saved", remedy="launch` with --from-scratch")
    assert mmscale("launch", config, *settings, "--dry-run", "--from-scratch").status == 0
    assert listing(run) == before

    by_train = Path(shutil.copytree(run, tmp_path / "by_train" / "tiny"))
    ended = mmscale("train", config, f"run.dir={by_train.parent}", *SETTINGS, "--from-scratch")
    assert ended.status == 0 and numbers(by_train) == undisturbed, ended
    assert len(events(by_train, "from_scratch")) == 1 and events(by_train, "start")[-1]["step"] == 0
    again = mmscale("train", config, f"run.dir={by_train.parent}", *SETTINGS, "--from-scratch")
    assert_says(again, status=4, cause="holds checkpoints .*deletes none", remedy="without --from-scratch")

    launched = start("launch", config, *settings, "--from-scratch", environ=SLOW)
    try:
        until_step(launched, run, 3, attempt=2)
        launched.process.send_signal(signal.SIGTERM)
        ended = launched.end(timeout_s=300.0)
    finally:
        launched.process.kill()
        launched.process.wait()
    assert ended.status == 75, ended
    saved = Store.of_run(run).steps()[-1]
    assert 3 <= saved < STEPS
    (folder,) = (run / "launch").iterdir()
    restarted = restart(folder)  # as SLURM starts a requeued job
    assert restarted.returncode == 0, restarted.stderr
    assert events(run, "resume")[-1]["step"] == saved and len(events(run, "from_scratch")) == 1
    assert numbers(run) == undisturbed
    shutil.rmtree(run / "checkpoints")
    refused = restart(folder)
    assert refused.returncode == 4 and f"says that step {STEPS} was saved" in refused.stderr, refused.stderr
    assert len(events(run, "from_scratch")) == 1


def restart(folder: Path) -> subprocess.CompletedProcess[str]:
    """The job of a launch folder once more."""
    command = [sys.executable, "-u", "-m", "launch.job", str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
