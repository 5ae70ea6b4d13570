# `mmscale data prepare --cluster` beside jobs of an earlier submission; on SLURM: tests/slurm/test_prepare_array.py.
"""Tests of submitting the parts of a data set."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.scheduler import JobState
from mmscale.cli import main
from mmscale.data.prepared.prepare import plan_shares
from mmscale.data.prepared.shares import SharedPlan
from tests.unit.data.modalities.test_image_tokens import save_model
from tests.unit.data.samples import config, corpus, files_of, text, write_jsonl
from tests.unit.launch.fake_slurm import FakeSlurm

RUNNING, PENDING, ENDED = (JobState("7", state) for state in ("RUNNING", "PENDING", "CANCELLED"))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "bin")
    fake.answer("sbatch", "echo sbatch: error: no >&2; exit 1")
    monkeypatch.setenv("PATH", f"{fake.folder}:/usr/bin:/bin")
    return fake


def submit(tmp_path: Path) -> int:
    profile = tmp_path / "here.yaml"
    profile.write_text("scheduler: slurm\ntasks_per_node: 1\n")
    file = write_jsonl(tmp_path / "other.jsonl", [{"id": "a", "content": [text("other")]}])
    command = ["data", "prepare", "--documents", str(file), "--out", str(tmp_path / "out"), "--overwrite"]
    return main([*command, "vocab.modalities=[{name: text, size: 300}]", "--cluster", str(profile), "--tasks", "2"])


def plan(tmp_path: Path) -> dict[str, bytes]:
    """What an earlier submission has left."""
    out = tmp_path / "out"
    file = write_jsonl(tmp_path / "d.jsonl", [{"id": "a", "content": [text("first")]}])
    plan_shares(config(documents=[str(file)]), out, number=2, progress=False)
    SharedPlan(1, ("7_0", "7_1", "8")).write(out)
    return files_of(out)


@pytest.mark.parametrize("states", [{"7_0": ENDED, "7_1": RUNNING, "8": PENDING}, {"8": PENDING}])
def test_nothing_is_submitted_while_jobs_make_the_data_set(
    states: dict[str, JobState], slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = plan(tmp_path)
    slurm.jobs(**states)
    assert submit(tmp_path) != 0
    said = capsys.readouterr().err
    going = ["7", "8"] if len(states) > 1 else ["8"]
    assert f"jobs are making {tmp_path / 'out'}: {', '.join(going)} wait or run" in said
    assert f"scancel {' '.join(going)}" in said
    assert files_of(tmp_path / "out") == before and not slurm.calls("sbatch")


def test_a_slurm_that_does_not_answer_may_have_jobs(slurm: FakeSlurm, tmp_path: Path) -> None:
    before = plan(tmp_path)
    slurm.away()
    assert submit(tmp_path) != 0
    assert files_of(tmp_path / "out") == before and not slurm.calls("sbatch")


def test_jobs_that_have_ended_are_in_nobodys_way(slurm: FakeSlurm, tmp_path: Path) -> None:
    plan(tmp_path)
    slurm.jobs(**{"7_0": ENDED, "7_1": ENDED, "8": ENDED})
    submit(tmp_path)
    assert slurm.calls("sbatch")


def test_slurm_is_looked_for_before_anything_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = plan(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit(tmp_path) != 0
    assert "a job array needs SLURM" in capsys.readouterr().err
    assert files_of(tmp_path / "out") == before


def prepare_on_gpus(tmp_path: Path, *, gpus: int, on_node: int) -> int:
    """Submit the parts of pictures for a neural tokenizer."""
    profile = tmp_path / "here.yaml"
    profile.write_text(f"scheduler: slurm\ntasks_per_node: 1\ngpus_per_node: {on_node}\ncpus_per_task: 3\n")
    model = save_model("JanusVQVAE", tmp_path / "model")
    image = f"data.prepare.image={{kind: vq, path: {model}, size: 16, channels: 3}}"
    sizes = "vocab.modalities=[{name: text, size: 300}, {name: image, size: 64}]"
    documents = ["--documents", str(corpus(tmp_path / "in", 12)), "--out", str(tmp_path / "out")]
    settings = [sizes, image, "data.prepare.part_documents=4"]
    command = ["data", "prepare", *documents, *settings, "--cluster", str(profile), "--tasks", "2"]
    return main([*command, "--gpus", str(gpus)])


@pytest.mark.parametrize("gpus", [0, 2])
def test_every_task_asks_for_its_gpus(slurm: FakeSlurm, tmp_path: Path, gpus: int) -> None:
    slurm.answer("sbatch", f"cat $1 >> {tmp_path}/scripts; echo Submitted batch job $$")
    assert prepare_on_gpus(tmp_path, gpus=gpus, on_node=8) == 0
    scripts = (tmp_path / "scripts").read_text()
    lines = scripts.splitlines()
    asked = [line for line in lines if line.startswith("#SBATCH --gpus-per-node")]
    # The array, and the job that makes what its tasks leave; not the one that finishes.
    assert asked == [f"#SBATCH --gpus-per-node={gpus}"] * (2 if gpus else 0)
    assert lines.count("#SBATCH --cpus-per-task=3") == (3 if gpus else 2) and "#SBATCH --array=0-1%2" in lines
    assert "gpus-per-node" not in scripts.rpartition("#!/bin/bash")[2]


@pytest.mark.parametrize("on_node", [0, 1])
def test_gpus_that_nodes_do_not_have_are_refused_first(
    on_node: int, slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare_on_gpus(tmp_path, gpus=2, on_node=on_node) != 0
    assert f"asks for 2 GPUs, and the profile's nodes have {on_node} (gpus_per_node)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not slurm.calls("sbatch")
