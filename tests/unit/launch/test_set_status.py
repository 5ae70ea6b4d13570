"""`mmscale status` of data sets that jobs prepare, alone and among runs."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch import record as records
from launch.scheduler import ExitCode, JobState
from mmscale.cli import app
from mmscale.cli import launch as launch_commands
from mmscale.data.prepared.folder import PLAN
from mmscale.data.prepared.shares import SharedPlan
from tests.module_time import replace_time
from tests.unit.data.samples import corpus
from tests.unit.launch.fake_slurm import FakeSlurm
from tests.unit.launch.test_status import launched

SPEC = """
vocab: {modalities: [{name: text, size: 300}, {name: image, size: 16}]}
model: {kind: dense, num_layers: 1, hidden_size: 64, ffn_hidden_size: 64, num_attention_heads: 1}
data:
  prepare: {image: {kind: levels, size: 4, channels: 1}, part_documents: 6, workers: 1, documents: [%s]}
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{fake.folder}:/usr/bin:/bin")
    return fake


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A set of two parts that the jobs 7_0, 7_1 and 8 make."""
    folder = tmp_path / "set"
    (folder / "done").mkdir(parents=True)
    (folder / "done" / "0.json").write_text("{}")
    SharedPlan(2, ("7_0", "7_1", "8")).write(folder)
    return folder


def shown(*folders: Path) -> list[dict[str, Any]]:
    ended = CliRunner().invoke(app, ["status", "--json", *map(str, folders)])
    assert ended.exit_code == 0, ended.output
    found: list[dict[str, Any]] = json.loads(ended.output)  # one document
    return found


def jobs(**states: str) -> dict[str, JobState]:
    return {number: JobState(number, state, exit=ExitCode(3 * (state == "FAILED"))) for number, state in states.items()}


def test_a_set_is_waited_for_as_long_as_a_job_of_it_lives(slurm: FakeSlurm, prepared: Path) -> None:
    slurm.jobs(**jobs(**{"7_0": "COMPLETED", "7_1": "FAILED", "8": "PENDING"}))
    (one,) = shown(prepared)
    assert (one["state"], one["ended"], one["done"], one["parts"], one["reason"]) == ("preparing", False, 1, 2, "")
    slurm.jobs(**jobs(**{"7_0": "COMPLETED", "7_1": "FAILED", "8": "FAILED"}))
    (one,) = shown(prepared)
    assert (one["state"], one["ended"], one["logs"]) == ("failed", True, str(prepared / "jobs"))
    assert "job 8" in one["reason"] and "FAILED (exit status 3)" in one["reason"]
    text = CliRunner().invoke(app, ["status", str(prepared)]).output
    assert "failed, 1 of 2 parts" in text and str(prepared / "jobs") in text
    slurm.jobs()  # forgotten
    assert shown(prepared)[0]["state"] == "failed"
    slurm.away()
    (one,) = shown(prepared)
    assert (one["state"], one["ended"]) == ("preparing", False) and "contact" in one["reason"]
    (prepared / "manifest.json").write_text("{}")
    assert (shown(prepared)[0]["state"], shown(prepared)[0]["ended"]) == ("prepared", True)


def test_before_its_jobs_are_submitted_a_set_has_not_failed(slurm: FakeSlurm, prepared: Path) -> None:
    SharedPlan(2).write(prepared)
    (one,) = shown(prepared)
    assert (one["state"], one["ended"], one["reason"]) == ("submitting", False, "")
    assert "submitting, 1 of 2 parts" in CliRunner().invoke(app, ["status", str(prepared)]).output
    hour_ago = time.time() - 3600  # whoever was to submit them is gone
    os.utime(prepared / PLAN, (hour_ago, hour_ago))
    (one,) = shown(prepared)
    assert (one["state"], one["ended"]) == ("failed", True) and "no job was submitted" in one["reason"]


def test_a_set_whose_jobs_slurm_refuses_has_failed(slurm: FakeSlurm, tmp_path: Path) -> None:
    spec, out, during = tmp_path / "spec.yaml", tmp_path / "set", tmp_path / "during.json"
    spec.write_text(SPEC % corpus(tmp_path / "in", 12))
    status = f"{shlex.quote(sys.executable)} -m mmscale status --json {shlex.quote(str(out))} > {during}"
    slurm.answer("sbatch", f'{status}; echo "sbatch: error: invalid account" >&2; exit 1')
    command = ["data", "prepare", str(spec), "--out", str(out), "--cluster", "test", "--tasks", "2"]
    ended = CliRunner().invoke(app, command)
    assert ended.exit_code and "invalid account" in ended.output + str(ended.exception)
    assert [one["state"] for one in json.loads(during.read_text())] == ["submitting"]
    (one,) = shown(out)
    assert (one["state"], one["ended"]) == ("failed", True) and "invalid account" in one["reason"]


def test_sets_and_runs_are_one_list(slurm: FakeSlurm, prepared: Path, tmp_path: Path) -> None:
    """A run may hold a plan.json of its own."""
    run = launched(tmp_path / "run", records.JobKey("9"))
    slurm.jobs(**jobs(**{"8": "RUNNING", "9": "CANCELLED"}))
    for content in ("{}", "[]", '{"time": 3}', "no JSON"):
        (run / PLAN).write_text(content)
        assert [one["state"] for one in shown(run)] == ["cancelled"], content
    assert [one["state"] for one in shown(run, prepared)] == ["cancelled", "preparing"]
    assert [one["state"] for one in shown(prepared, run)] == ["preparing", "cancelled"]
    text = CliRunner().invoke(app, ["status", str(run), str(prepared)]).output
    assert "preparing, 1 of 2 parts" in text and "cancelled" in text


def test_a_watched_list_ends_when_all_have_ended(
    slurm: FakeSlurm, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = launched(tmp_path / "run", records.JobKey("9"))
    slurm.jobs(**jobs(**{"8": "RUNNING", "9": "CANCELLED"}))
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        (prepared / "manifest.json").write_text("{}")

    replace_time(monkeypatch, launch_commands, sleep=sleep)
    ended = CliRunner().invoke(app, ["status", "--watch", "5", "--json", str(prepared), str(run)])
    first, last = (json.loads(line) for line in ended.output.splitlines())
    assert slept == [5.0]
    assert [[one["state"] for one in found] for found in (first, last)] == [
        ["preparing", "cancelled"],
        ["prepared", "cancelled"],
    ]
