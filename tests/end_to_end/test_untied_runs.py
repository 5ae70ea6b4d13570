"""Weights for each modality (model.untie) through the commands: train, resume, evaluate, export and back, upcycle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_tools.sources import open_source
from tests.end_to_end.running import assert_goes_on_alike, assert_says, mmscale, ok

STEPS = 6
MAIN = (
    *(f"train.steps={2 * STEPS}", "optim.schedule=constant", "optim.warmup=3", "train.eval_every=0", "log.every=1"),
    *(f"checkpoint.every={STEPS}", "checkpoint.asynchronous=false"),
)
DENSE = ("model.kind=dense", "model.experts.counts={}", "model.depth=null", "parallel.ep=1")
UNTIE = "model.untie=[attention,ffn,norms]"
MODELS: dict[str, tuple[str, ...]] = {
    "dense": DENSE,
    "mot": (*DENSE, UNTIE),
    "hybrid": ("model.untie=[attention,norms]",),  # with experts, Mixture-of-Depths and EP 2
    "mot_2t1i": ("model.untie=[attention,norms]", "model.experts={counts: {text: 2, image: 1}, ungated: [image]}"),
}


@pytest.fixture(scope="module")
def runs(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every model, with checkpoints of steps 6 and 12."""
    folder = tmp_path_factory.mktemp("untied")
    for name, model in MODELS.items():
        nproc = 1 if model[: len(DENSE)] == DENSE else 2
        ok("train", config, f"run.dir={folder}", f"run.name={name}", *MAIN, *model, nproc=nproc)
    return folder


def held_out(run: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ok("eval", run, "--batches", "2", "--json"))
    return {name: value for name, value in found.items() if isinstance(value, float) and "loss" in name}


@pytest.mark.long
def test_a_stopped_run_resumes_with_the_same_losses(config: Path, runs: Path, tmp_path: Path) -> None:
    """Bit by bit on the same layout; to rounding on two tensor-parallel ranks."""
    settings = (config, "run.name=mot", *MAIN, *MODELS["mot"])
    for change in ("", "parallel.tp=2"):
        assert_goes_on_alike(runs / "mot", tmp_path / (change or "same"), settings, at=STEPS, change=change)


@pytest.mark.long
@pytest.mark.parametrize("name", ["mot", "hybrid", "mot_2t1i"])
def test_an_export_computes_the_same_and_comes_back(name: str, runs: Path, tmp_path: Path) -> None:
    if name != "mot":
        stage = ("--stage", "auxiliary", "auxiliary.steps=4", "auxiliary.calibration_batches=2", "parallel.ep=1")
        ok("train", runs / name / "config.yaml", *stage)
    ok("convert", "to-hf", runs / name, tmp_path / "hf")
    report = json.loads((tmp_path / "hf" / "conversion_report.json").read_text())
    assert report["gate"]["passed"] and report["gate"]["max_abs"] < 1e-5 and report["gate"]["generated"] > 0
    ok("convert", "from-hf", tmp_path / "hf", tmp_path / "back")
    one, other = open_source(runs / name, 2 * STEPS), open_source(tmp_path / "back", 0)
    names = [weight for weight in one.names(weights=True) if "auxiliary" not in weight]
    assert any(weight.endswith("linear_qkv.image") for weight in names)
    for weight in names:
        assert torch.equal(one.read(weight), other.read(weight)), weight


@pytest.mark.long
def test_an_imported_export_trains_with_frozen_text(runs: Path, tmp_path: Path) -> None:
    """`convert from-hf`, then `optim.freeze=[text]`: text weights stay bit for bit, image weights do not."""
    ok("convert", "to-hf", runs / "mot", tmp_path / "hf")
    ok("convert", "from-hf", tmp_path / "hf", tmp_path / "back")
    more = ("optim.freeze=[text]", "train.steps=3", "optim.warmup=0", "checkpoint.allow_missing=true")
    ok("train", tmp_path / "back" / "config.yaml", *more, "checkpoint.every=3", "parallel.tp=2", nproc=2)
    before, after = open_source(tmp_path / "back", 0), open_source(tmp_path / "back", 3)
    names = before.names(weights=True)
    text, image = ([name for name in names if name.endswith(f".{kind}")] for kind in ("text", "image"))
    assert len(text) == len(image) > 4
    assert all(torch.equal(before.read(name), after.read(name)) for name in text)
    assert not any(torch.equal(before.read(name), after.read(name)) for name in image)


def test_another_untie_is_another_model(config: Path, runs: Path) -> None:
    refused = mmscale(
        "train", config, f"run.dir={runs}", "run.name=mot", *MAIN, *DENSE, "model.untie=[ffn]", "train.steps=14"
    )
    cause = r"model.untie was \['attention', 'ffn', 'norms'\], is \['ffn'\]"
    assert_says(refused, status=4, cause=cause, remedy="restore these settings")


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("dense", ("--untie", "attention,ffn,norms")),
        pytest.param("dense", ("--untie", "norms,final_norm"), marks=pytest.mark.long),
        pytest.param("hybrid", (), marks=pytest.mark.long),
    ],
    ids=["all", "norms", "hybrid"],
)
def test_untying_changes_nothing_and_training_goes_on(
    source: str, options: tuple[str, ...], config: Path, runs: Path, tmp_path: Path
) -> None:
    """Held-out losses are equal, moments are copies, and the next step is taken from the copied state."""
    if source == "hybrid":  # a model with experts and Mixture-of-Depths that is not untied yet
        ok("train", config, f"run.dir={tmp_path}", "run.name=plain", *MAIN, nproc=2)
        run, options = tmp_path / "plain", ("--untie", "attention,norms,final_norm")
    else:
        run = runs / source
    up = tmp_path / "up"
    made = json.loads(ok("ckpt", "upcycle", f"{run}@{STEPS}", up, *options, "--json"))
    assert made["untie"] == options[1].split(",") and "copies" in made["preserves"]
    assert held_out(up) == pytest.approx(held_out(f"{run}@{STEPS}"), rel=1e-6)
    old, new = open_source(run, STEPS), open_source(up, 0)
    before, after = old.names(), new.names()
    parts = [name for name in after if name not in before]
    assert parts and all(name.endswith((".text", ".image")) for name in parts)
    for name in parts:
        assert torch.equal(new.read(name), old.read(f"{name.rpartition('.')[0]}.weight")), name
    ok("train", up / "config.yaml", "train.steps=4", nproc=2 if source == "hybrid" else 1)


@pytest.mark.parametrize(
    ("name", "rest"), [("mot", ()), pytest.param("dense", ("--untie", "attention,norms"), marks=pytest.mark.long)]
)
def test_experts_take_the_place_of_each_modalitys_ffn(
    name: str, rest: tuple[str, ...], runs: Path, tmp_path: Path
) -> None:
    up = tmp_path / "up"
    ok("ckpt", "upcycle", f"{runs / name}@{STEPS}", up, "--experts", "text=2,image=3", *rest)
    old, new = open_source(runs / name, STEPS), open_source(up, 0)
    assert new.info()["config"]["model"]["untie"] == ["attention", "norms"]
    for modality, count in (("text", 2), ("image", 3)):
        fc2 = old.read(f"decoder.layers.1.mlp.linear_fc2.{modality if name == 'mot' else 'weight'}")
        w2 = new.read(f"decoder.layers.1.mlp.experts.{modality}.w2")
        assert len(w2) == count and all(torch.equal(expert, fc2.t()) for expert in w2)
    ok("train", up / "config.yaml", "train.steps=4")


@pytest.mark.parametrize("name", ["dense", pytest.param("mot", marks=pytest.mark.long)])
def test_an_ungated_group_is_the_ffn(name: str, runs: Path, tmp_path: Path) -> None:
    """With its optimizer state; another upcycling keeps it."""
    up, again = tmp_path / "up", tmp_path / "again"
    ok("ckpt", "upcycle", f"{runs / name}@{STEPS}", up, "--experts", "text=1,image=1", "--ungated", "image")
    old, new = open_source(runs / name, STEPS), open_source(up, 0)
    own = "image" if name == "mot" else "weight"
    for prefix in ("", "optimizer.state.exp_avg."):
        mlp = f"{prefix}decoder.layers.1.mlp."
        assert torch.equal(new.read(f"{mlp}ungated.image.w2")[0], old.read(f"{mlp}linear_fc2.{own}").t())
        gate, linear = old.read(f"{mlp}linear_fc1.{own}").chunk(2)
        w1 = new.read(f"{mlp}ungated.image.w1")[0]
        assert torch.equal(w1[:, 0], gate.t()) and torch.equal(w1[:, 1], linear.t())
    ok("ckpt", "upcycle", up, again, "--experts", "text=4,image=1")
    kept = "decoder.layers.1.mlp.ungated.image.w2"
    assert torch.equal(open_source(again, 0).read(kept), new.read(kept))
    ok("train", again / "config.yaml", "train.steps=4", "parallel.ep=2", nproc=2)


@pytest.mark.parametrize(
    ("name", "options", "cause", "remedy"),
    [
        ("dense", (), "there is nothing to do", "--experts"),
        ("mot", ("--untie", "ffn"), "untied already", "leave it out"),
        ("mot", ("--experts", "mixed=4"), "an FFN or a norm of its own", "text=N, image=N"),
        ("dense", ("--untie", "embedding"), "is no part", "attention, ffn, norms"),
        ("dense", ("--untie", "ffn", "--experts", "text=2,image=2"), "are experts", "remove ffn"),
    ],
)
def test_what_upcycling_refuses(
    name: str, options: tuple[str, ...], cause: str, remedy: str, runs: Path, tmp_path: Path
) -> None:
    refused = mmscale("ckpt", "upcycle", f"{runs / name}@{STEPS}", tmp_path / "up", *options)
    assert_says(refused, status=2, cause=cause, remedy=remedy)
    assert not (tmp_path / "up").exists()
