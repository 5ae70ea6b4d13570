"""A run with Muon through the commands: train, resume, change to AdamW, upcycle, verify the layout, export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpoints_tools.sources import open_source
from mmscale.runs.metrics import read_metrics
from tests.end_to_end.running import assert_says, mmscale
from tests.end_to_end.test_upcycle import DENSE, MAIN, STEPS

MUON = "optim.optimizer=muon"
CONSTANT = "optim.schedule=constant"  # so that a run can be extended
SECOND = "optimizer.state.exp_avg_sq."
FC1 = "decoder.layers.0.mlp.linear_fc1.weight"


@pytest.fixture(scope="module")
def run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense run of eight steps on two ranks, with checkpoints of steps 4 and 8."""
    folder = tmp_path_factory.mktemp("muon")
    options = (f"run.dir={folder}", "run.name=muon", *MAIN, *DENSE, MUON, CONSTANT)
    ended = mmscale("train", config, *options, "parallel.tp=2", nproc=2)
    assert ended.status == 0, ended
    return folder / "muon"


def test_losses_fall_and_matrices_have_no_second_moment(run: Path) -> None:
    losses = [row["loss"] for row in read_metrics(run) if "loss" in row]
    assert len(losses) >= STEPS and losses[-1] < losses[0]
    names = set(open_source(run, STEPS).names())
    assert f"optimizer.state.exp_avg.{FC1}" in names and f"{SECOND}{FC1}" not in names
    assert f"{SECOND}embedding.word_embeddings.weight" in names


def test_a_change_to_adamw_is_refused_or_trains_on(run: Path, config: Path, tmp_path: Path) -> None:
    copy = tmp_path / "adam"
    ended = mmscale("ckpt", "reshard", f"{run}@{2 * STEPS}", copy)
    assert ended.status == 0, ended
    options = (f"run.dir={tmp_path}", "run.name=adam", *MAIN, *DENSE, CONSTANT, f"train.steps={2 * STEPS + 2}")
    ended = mmscale("train", config, *options, "optim.beta2=0.999")
    cause = "Adam has no moments of the matrices that Muon trained"
    assert_says(ended, status=2, cause=cause, remedy="keep optim.optimizer=muon")
    ended = mmscale("train", config, *options)
    assert ended.status == 0, ended
    found = open_source(copy, 2 * STEPS + 2)
    assert float(found.read(f"{SECOND}{FC1}").max()) > 0


@pytest.mark.long
def test_an_upcycled_model_trains_on_with_muon(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "up"
    ended = mmscale("ckpt", "upcycle", f"{run}@{STEPS}", out, "--experts", "text=2,image=2", "--keep-moments", "--json")
    assert ended.status == 0, ended
    first = open_source(out, 0)
    name = "decoder.layers.0.mlp.experts.text.w1"
    assert first.read(f"optimizer.state.exp_avg.{name}").any() and f"{SECOND}{name}" not in first.names()
    ended = mmscale("train", out / "config.yaml", "parallel.tp=1", "parallel.ep=2", nproc=2)
    assert ended.status == 0, ended


def test_the_layout_is_verified(config: Path, tmp_path: Path) -> None:
    ended = mmscale("verify-layout", config, f"run.dir={tmp_path}", MUON, "parallel.ep=2", "--json", nproc=2)
    assert ended.status == 0, ended
    assert json.loads(ended.out)["passed"] is True


@pytest.mark.exhaustive
def test_an_export_passes_its_gate(run: Path, tmp_path: Path) -> None:
    ended = mmscale("convert", "to-hf", run, tmp_path / "hf")
    assert ended.status == 0 and "gate" in ended.out, ended
