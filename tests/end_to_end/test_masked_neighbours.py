"""RA-CM3 through the commands, where it meets something else: changed settings, auxiliary routers, loss weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmscale.runs.metrics import read_metrics
from tests.end_to_end.running import assert_says, mmscale, ok

EXACT = ("loss", "grad_norm", "loss/text", "loss/image", "tokens", "lr")
WEIGHTED = ("loss_weights/effective_share/text", "loss_weights/mean/image")
WEIGHTS = "train.loss_weights={warmup: 1, temperature: 0.5, decay: 0.5}"
STEADY = ("optim.schedule=constant",)

Figures = dict[int, dict[str, Any]]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, tiny: dict[str, Any]) -> Path:
    """A configuration with experts, holes and up to two neighbours; its data, `set`, is beside it."""
    root = tmp_path_factory.mktemp("ra_cm3")
    file = root / "both.yaml"
    made = {
        **tiny,
        "run": {"name": "both", "dir": str(root / "runs")},
        "vocab": {**tiny["vocab"], "reserved": True},
        "model": {**tiny["model"], "depth": None},
        "data": {**tiny["data"], "path": str(root / "set"), "retrieval": {"neighbours": 2}},
        "train": {**tiny["train"], "steps": 3, "eval_every": 0},
        "optim": {**tiny["optim"], "warmup": 0, "lr": 1e-4},  # losses that fall quickly are all below the averages
        "objective": {"cm3_rate": 0.8, "image_spans": "partial"},
        "parallel": {},
        "checkpoint": {"every": 3, "keep": 9, "asynchronous": False},
    }
    file.write_text(yaml.safe_dump(made))
    ok("data", "prepare", file, "--out", root / "set")
    ok("data", "retrieve", root / "set")
    return file


def trained(file: Path, runs: Path, *overrides: str, nproc: int = 1) -> Figures:
    """What each step of a run gave."""
    ok("train", file, f"run.dir={runs}", *STEADY, *overrides, nproc=nproc)
    return {line["step"]: line for line in read_metrics(runs / "both")}


@pytest.fixture(scope="module")
def begun(settings: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of runs of 3 steps, without and with weights."""
    found = {name: tmp_path_factory.mktemp(name) for name in ("plain", "weighted")}
    trained(settings, found["plain"])
    trained(settings, found["weighted"], WEIGHTS)
    return found


def assert_same(found: Figures, wanted: Figures, *keys: str) -> None:
    assert found.keys() == wanted.keys()
    for step, line in wanted.items():
        assert {key: found[step].get(key) for key in keys} == {key: line.get(key) for key in keys}, step


# What is set differently after step 3, which is within the first epoch.
CHANGES: dict[str, tuple[str, ...]] = {
    "both": ("objective.cm3_rate=0.3", "data.retrieval.neighbours=1"),
    "the rate": ("objective.cm3_rate=0.3",),
    "the neighbours": ("data.retrieval.neighbours=1",),
    "no neighbours": ("data.retrieval.neighbours=0",),
    "no holes": ("objective.cm3_rate=0",),
    "spans": ("objective.image_spans=whole",),
}


@pytest.mark.long
@pytest.mark.parametrize("weights", [(), (WEIGHTS,)], ids=["plain", "weighted"])
@pytest.mark.parametrize(
    "change", ["both", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in list(CHANGES)[1:])]
)
def test_after_a_change_a_run_resumes_bit_by_bit(
    settings: Path, begun: dict[str, Path], change: str, weights: tuple[str, ...], tmp_path: Path
) -> None:
    """The same in one piece and in two, and to rounding over two expert-parallel ranks."""
    after, runs = (*CHANGES[change], *weights), begun["weighted" if weights else "plain"]
    for name in ("whole", "parts", "ep2"):
        shutil.copytree(runs / "both", tmp_path / name / "both")
    ended = mmscale("train", settings, f"run.dir={tmp_path / 'whole'}", *STEADY, *after, "train.steps=8")
    assert_says(ended, status=2, cause=after[0].split("=")[0], remedy="--yes")
    ended = mmscale("train", settings, f"run.dir={tmp_path / 'whole'}", *STEADY, *after, "train.steps=8", "--yes")
    assert ended.status == 0 and "no document is read twice" in ended.out + ended.err, ended
    whole = {line["step"]: line for line in read_metrics(tmp_path / "whole" / "both")}
    trained(settings, tmp_path / "parts", *after, "train.steps=5", "--yes")
    parts = trained(settings, tmp_path / "parts", *after, "train.steps=8")
    assert_same(parts, whole, *EXACT, *WEIGHTED)
    spread = trained(settings, tmp_path / "ep2", *after, "train.steps=8", "parallel.ep=2", "--yes", nproc=2)
    for step, line in whole.items():
        assert spread[step]["loss"] == pytest.approx(line["loss"], rel=2e-5), step
    assert any(line.get(WEIGHTED[0], 1.0) < 1.0 for line in whole.values()) is bool(weights)


@pytest.mark.long
def test_auxiliary_routers_are_trained_and_resumed(settings: Path, begun: dict[str, Path], tmp_path: Path) -> None:
    """On composites with holes; the routers' evaluation and that of their run read plain held-out documents."""
    steps = ("--stage", "auxiliary", "auxiliary.steps=4", "auxiliary.checkpoint_every=2")
    steady = ("auxiliary.optim.schedule=constant", "auxiliary.calibration_batches=2")
    found: dict[str, list[dict[str, Any]]] = {}
    for name in ("whole", "parts", "alone"):
        shutil.copytree(begun["plain"] / "both", tmp_path / name / "both")
        stage = ("train", settings, f"run.dir={tmp_path / name}", *steps, *steady)
        if name == "parts":
            ok(*stage, "auxiliary.steps=2")
        ok(*stage, *(("data.retrieval.neighbours=0", "--yes") if name == "alone" else ()))
        rows = read_metrics(tmp_path / name / "both" / "auxiliary")
        found[name] = [{key: value for key, value in row.items() if "loss" in key} for row in rows]
    assert found["parts"] == found["whole"] and found["whole"][0]
    assert found["alone"] != found["whole"]
    way = ("eval", tmp_path / "whole" / "both", "--routing", "causal", "--batches", "2", "--json")
    losses = {near: json.loads(ok(*way, "--neighbours", near))["loss"] for near in ("0", "2")}
    assert losses["0"] != losses["2"]
