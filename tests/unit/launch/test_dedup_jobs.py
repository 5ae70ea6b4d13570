# `mmscale data dedup --cluster` and `mmscale status`: states of jobs; on SLURM: tests/slurm/test_prepare_array.py.
"""Tests of submitting a deduplication and of what `status` says about it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch.job_table import JobTable
from launch.scheduler import JobState
from mmscale.cli import main
from mmscale.cli.set_status import state_of
from mmscale.data.dedup import shared, submitted
from mmscale.data.dedup.pairs import DuplicateRule
from mmscale.data.prepared import shares
from mmscale.data.prepared.prepare import plan_shares, prepare
from tests.unit.data.samples import config, corpus
from tests.unit.launch.fake_slurm import FakeSlurm

NUMBERS = ("7_0", "7_1", "8_0", "8_1", "9")
RUNNING, PENDING, ENDED = (JobState("7", state) for state in ("RUNNING", "PENDING", "CANCELLED"))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Accepts jobs with the numbers 7, 8, 9."""
    fake = FakeSlurm(tmp_path / "bin")
    fake.answer("sbatch", f"echo x >> {tmp_path}/sent; echo Submitted batch job $((6 + $(wc -l < {tmp_path}/sent)))")
    monkeypatch.setenv("PATH", f"{fake.folder}:/usr/bin:/bin")
    return fake


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set of three parts, which jobs have prepared."""
    settings = config(documents=[str(corpus(tmp_path / "in", 24))], part_documents=8)
    plan_shares(settings, tmp_path / "set", number=1, progress=False)
    prepare(settings, tmp_path / "set", progress=False)
    return tmp_path / "set"


def dedup(folder: Path, *more: str) -> int:
    profile = folder.parent / "here.yaml"
    profile.write_text("scheduler: slurm\ntasks_per_node: 1\n")
    return main(["data", "dedup", str(folder), *more, "--cluster", str(profile), "--tasks", "2"])


def told(folder: Path) -> dict[str, Any]:
    return state_of(folder, JobTable()) or {}


def test_status_follows_the_jobs(slurm: FakeSlurm, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(folder)["state"] == "prepared"
    assert dedup(folder) == 0
    slurm.jobs(**dict.fromkeys(NUMBERS, PENDING))
    found = told(folder)
    assert (found["state"], found["read"], found["slices"], found["ended"]) == ("deduplicating", 0, 3, False)
    assert tuple(found["jobs"]) == NUMBERS and Path(found["logs"]).is_dir()
    planned = shared.plan_tasks(folder, rule=DuplicateRule(), tasks=2)
    reads, compares, (last,) = planned.stages(workers=1)
    reads[0]()
    assert told(folder)["read"] == 1
    capsys.readouterr()
    assert main(["status", str(folder)]) == 0
    assert "deduplicating, 1 of 3 slices read, 0 ranges of keys compared" in capsys.readouterr().out
    slurm.jobs(**dict.fromkeys(NUMBERS, ENDED))
    found = told(folder)
    assert (found["state"], found["ended"]) == ("failed", True)
    assert "job 9, which was to finish, has not" in found["reason"] and "`mmscale data dedup` again" in found["reason"]
    for task in (*reads, *compares, last):
        task()
    assert (told(folder)["state"], told(folder)["read"], told(folder)["ended"]) == ("deduplicated", 3, True)
    capsys.readouterr()
    assert main(["status", str(folder), "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert one["kind"] == "data set" and one["state"] == "deduplicated"
    assert main(["data", "dedup", str(folder), "--remove"]) == 0
    assert told(folder)["state"] == "prepared"


@pytest.mark.parametrize("request_", [(), ("--match", "text")], ids=["the same", "another"])
def test_nothing_is_submitted_while_jobs_deduplicate(
    slurm: FakeSlurm, folder: Path, request_: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert dedup(folder) == 0
    slurm.jobs(**{"8_0": RUNNING, "9": PENDING})
    sent = len(slurm.calls("sbatch"))
    assert dedup(folder, *request_) != 0
    said = capsys.readouterr().err
    assert f"jobs are deduplicating {folder}: 8, 9 wait or run" in said and "scancel 8 9" in said
    assert len(slurm.calls("sbatch")) == sent == 3
    slurm.jobs(**{"8_0": ENDED, "9": ENDED})
    assert dedup(folder, *request_) == 0 and len(slurm.calls("sbatch")) == 6


def test_a_refusal_is_told(slurm: FakeSlurm, folder: Path) -> None:
    slurm.answer("sbatch", "echo sbatch: error: no such partition >&2; exit 1")
    slurm.jobs()
    assert dedup(folder) != 0
    found = told(folder)
    assert found["state"] == "failed" and "no such partition" in found["reason"] and found["jobs"] == []
    shutil.rmtree(folder / ".cache")
    assert told(folder)["state"] == "prepared"


@pytest.mark.parametrize("content", ["", "{}", '{"scratch": 1}', "[]"])
def test_a_damaged_record_is_none(slurm: FakeSlurm, folder: Path, content: str) -> None:
    slurm.jobs()
    file = folder / submitted.FILE
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert submitted.dedup_status(folder) is None and told(folder)["state"] == "prepared"


def test_a_submission_that_was_killed(slurm: FakeSlurm, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = shared.plan_tasks(folder, rule=DuplicateRule(), tasks=2)
    planned.keep_jobs()
    assert told(folder)["state"] == "submitting"
    monkeypatch.setattr(shares, "_SUBMITTED_WITHIN_S", 0.0)
    assert told(folder)["state"] == "failed" and "no job was submitted" in told(folder)["reason"]
