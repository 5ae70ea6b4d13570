"""Causal masking through the commands: train, resume, other layouts, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mmscale.runs.metrics import read_metrics
from tests.end_to_end.conftest import SETTINGS
from tests.end_to_end.running import assert_says, mmscale, ok

STEPS = 6
EXACT = ("loss", "grad_norm", "loss/text", "loss/image", "tokens", "eval/loss")


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration with causal masking; its data, `set`, is beside it."""
    root = tmp_path_factory.mktemp("masked")
    file = root / "masked.yaml"
    settings = {
        **SETTINGS,
        "run": {"name": "masked", "dir": str(root / "runs")},
        "vocab": {**SETTINGS["vocab"], "reserved": True},
        "model": {**SETTINGS["model"], "kind": "dense", "experts": {}, "depth": None},
        "data": {**SETTINGS["data"], "path": str(root / "set")},
        "train": {**SETTINGS["train"], "steps": STEPS, "eval_every": 3},
        "optim": {**SETTINGS["optim"], "warmup": 0},
        "objective": {"cm3_rate": 0.8, "image_spans": "partial"},
        "parallel": {},
        "checkpoint": {"every": 3, "keep": 9, "asynchronous": False},
    }
    file.write_text(yaml.safe_dump(settings))
    ok("data", "prepare", file, "--out", root / "set")
    return file


def trained(file: Path, runs: Path, *overrides: str, nproc: int = 1) -> dict[int, dict[str, Any]]:
    """What each step of a run gave."""
    ok("train", file, f"run.dir={runs}", "optim.schedule=constant", *overrides, nproc=nproc)
    return {line["step"]: line for line in read_metrics(runs / "masked")}


@pytest.fixture(scope="module")
def whole(masked: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Figures of a run in one process."""
    return trained(masked, tmp_path_factory.mktemp("whole"))


def test_resumed_bit_by_bit(masked: Path, whole: dict[int, dict[str, Any]], tmp_path: Path) -> None:
    trained(masked, tmp_path, "train.steps=3")
    resumed = trained(masked, tmp_path)
    for step, line in whole.items():
        assert {key: resumed[step].get(key) for key in EXACT} == {key: line.get(key) for key in EXACT}


def test_held_out_losses_are_those_of_plain_documents(
    masked: Path, whole: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    """Before anything was learned runs with and without causal masking measure the same."""
    still = ("optim.lr=1e-12", "optim.min_lr=0", "train.steps=1", "train.eval_every=1")
    one = trained(masked, tmp_path / "one", *still)
    other = trained(masked, tmp_path / "other", *still, "objective.cm3_rate=0")
    assert one[1]["eval/loss"] == pytest.approx(other[1]["eval/loss"], rel=1e-6)
    assert one[1]["loss"] == whole[1]["loss"] != other[1]["loss"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("overrides", ["parallel.tp=2", "parallel.pp=2", "train.micro_batch_size=2"])
def test_layouts_train_alike(masked: Path, whole: dict[int, dict[str, Any]], overrides: str, tmp_path: Path) -> None:
    found = trained(masked, tmp_path, overrides, nproc=2)
    for step, line in whole.items():
        for key in ("loss", "grad_norm", "eval/loss"):
            if key in line:
                assert found[step][key] == pytest.approx(line[key], rel=2e-5), (step, key)


def test_refused(masked: Path, tmp_path: Path) -> None:
    run = ("train", masked, f"run.dir={tmp_path}")
    ended = mmscale(*run, "vocab.reserved=false")
    assert_says(ended, status=2, cause="needs tokens for holes", remedy="vocab.reserved=true")
    assert not (tmp_path / "masked").exists()
    trained(masked, tmp_path, "train.steps=1", "train.eval_every=0")
    ended = mmscale(*run, "train.steps=2", "objective.cm3_rate=0.1")
    assert_says(ended, status=2, cause=r"objective.cm3_rate: 0.8 -> 0.1", remedy="--yes")
