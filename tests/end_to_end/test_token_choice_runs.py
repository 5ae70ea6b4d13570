"""Token choice through the commands: train, resume, evaluate, export and back, sample, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_tools.sources import open_source
from mmscale.runs.metrics import read_metrics
from tests.end_to_end.running import assert_goes_on_alike, assert_says, mmscale, ok

STEPS = 6
MAIN = (
    *(f"train.steps={2 * STEPS}", "optim.schedule=constant", "optim.warmup=3", "train.eval_every=6", "log.every=1"),
    *(f"checkpoint.every={STEPS}", "checkpoint.asynchronous=false", "parallel.ep=1"),
)
CHOICE = "model.experts.token_choice={top_k: 2, bias_rate: 0.01}"
MODELS: dict[str, tuple[str, ...]] = {
    "tc": (CHOICE, "model.depth=null", "model.experts.counts={text: 4, image: 3}"),
    "mixed": ("model.kind=moe", "model.experts.counts={mixed: 8}", "model.depth=null", CHOICE, "parallel.ep=2"),
    "depth": ("model.experts.token_choice={scores: softmax, capacity_factor: 1.25}", "parallel.ep=2"),
}


@pytest.fixture(scope="module")
def runs(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every model, with checkpoints of steps 6 and 12."""
    folder = tmp_path_factory.mktemp("token_choice")
    for name, model in MODELS.items():
        nproc = 1 if name == "tc" else 2
        ok("train", config, f"run.dir={folder}", f"run.name={name}", *MAIN, *model, nproc=nproc)
    return folder


def biases(run: Path, step: int) -> dict[str, torch.Tensor]:
    source = open_source(run, step)
    return {name: source.read(name) for name in source.names(weights=True) if ".router_bias." in name}


@pytest.mark.long
def test_a_stopped_run_resumes_with_the_same_losses_and_biases(config: Path, runs: Path, tmp_path: Path) -> None:
    """Bit by bit on the same layout; on two expert-parallel ranks losses to rounding, biases exactly."""
    settings = (config, "run.name=tc", *MAIN, *MODELS["tc"])
    wanted = biases(runs / "tc", 2 * STEPS)
    assert wanted and all(bias.any() for bias in wanted.values())
    for change in ("", "parallel.ep=2"):
        run = assert_goes_on_alike(runs / "tc", tmp_path / (change or "same"), settings, at=STEPS, change=change)
        found = biases(run, 2 * STEPS)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], bias) for name, bias in wanted.items()), change


def test_what_is_logged_and_what_was_dropped(runs: Path) -> None:
    lines = [line for line in read_metrics(runs / "depth") if "experts/text/dropped_fraction" in line]
    assert len(lines) == 2 * STEPS and any(line["experts/text/dropped_fraction"] > 0.0 for line in lines)
    free = [line for line in read_metrics(runs / "tc") if "experts/text/dropped_fraction" in line]
    assert free and all(line["experts/text/dropped_fraction"] == 0.0 for line in free)
    assert all(line["experts/text/unrouted_fraction"] == 0.0 for line in free)


def test_held_out_losses_are_causal_as_they_are(runs: Path) -> None:
    """No causal losses beside them, and every routing mode of `eval` gives the same."""
    keys = {key for line in read_metrics(runs / "tc") for key in line}
    assert "eval/loss" in keys and not any(key.startswith("eval/causal") for key in keys)

    def held_out(*options: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(ok("eval", runs / "tc", "--batches", "2", "--json", *options))
        assert found["sees_later_tokens"] is False
        return {name: value for name, value in found.items() if isinstance(value, float) and "loss" in name}

    batch = held_out()
    assert batch and held_out("--routing", "causal") == batch == held_out("--routing", "batch")


@pytest.mark.long
@pytest.mark.parametrize("name", ["tc", "mixed", "depth"])
def test_an_export_computes_the_same_and_comes_back(name: str, runs: Path, tmp_path: Path) -> None:
    if name == "depth":  # Mixture-of-Depths layers still choose among tokens
        stage = ("--stage", "auxiliary", "auxiliary.steps=4", "auxiliary.calibration_batches=2", "parallel.ep=1")
        ok("train", runs / name / "config.yaml", *stage)
    ok("convert", "to-hf", runs / name, tmp_path / "hf")
    report = json.loads((tmp_path / "hf" / "conversion_report.json").read_text())
    assert report["gate"]["passed"] and report["gate"]["max_abs"] < 1e-5 and report["gate"]["generated"] > 0
    assert report["model"]["class"] == "MomaForCausalLM"
    ok("convert", "from-hf", tmp_path / "hf", tmp_path / "back")
    one, other = open_source(runs / name, 2 * STEPS), open_source(tmp_path / "back", 0)
    names = [weight for weight in one.names(weights=True) if "auxiliary" not in weight]
    assert any(".router_bias." in weight for weight in names)
    for weight in names:
        assert torch.equal(one.read(weight), other.read(weight)), weight


DENSE = ("model.kind=dense", "model.experts.counts={}", "model.depth=null")


@pytest.fixture(scope="module")
def dense(config: Path, runs: Path) -> Path:
    ok("train", config, f"run.dir={runs}", "run.name=dense", *MAIN, *DENSE)
    return runs / "dense"


@pytest.mark.parametrize("groups", ["text=4,image=3", pytest.param("mixed=6", marks=pytest.mark.long)])
def test_upcycling_with_several_choices_changes_nothing(groups: str, dense: Path, tmp_path: Path) -> None:
    """Gates add up to 1 and experts are copies. A token that one expert takes gets about half."""

    def held_out(run: str | Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(ok("eval", run, "--batches", "2", "--json"))
        return {name: value for name, value in found.items() if isinstance(value, float) and "loss" in name}

    wanted = held_out(f"{dense}@{STEPS}")
    for top_k, equal in ((3, True), (1, False)):
        up = tmp_path / f"up{top_k}"
        made = json.loads(
            ok("ckpt", "upcycle", f"{dense}@{STEPS}", up, "--experts", groups, "--top-k", str(top_k), "--json")
        )
        assert ("add up to 1" in made["preserves"]) is equal
        assert (held_out(up) == pytest.approx(wanted, rel=1e-6)) is equal
        ok("train", up / "config.yaml", "train.steps=4")
        assert any(bias.any() for bias in biases(up, 4).values())


@pytest.mark.parametrize(
    ("run", "options", "cause", "remedy"),
    [
        ("dense", ("--untie", "norms", "--top-k", "2"), "there are none", "give --experts"),
        ("dense", ("--experts", "mixed=2", "--top-k", "3"), "the group mixed has only 2 experts", "lower top_k"),
        ("tc", ("--experts", "text=8,image=8"), "has 4 experts of text", "one expert of each group"),
    ],
)
def test_what_upcycling_refuses(
    run: str, options: tuple[str, ...], cause: str, remedy: str, dense: Path, tmp_path: Path
) -> None:
    refused = mmscale("ckpt", "upcycle", f"{dense.parent / run}@{STEPS}", tmp_path / "up", *options)
    assert_says(refused, cause=cause, remedy=remedy, status=4 if run == "tc" else 2)
    assert not (tmp_path / "up").exists()


@pytest.mark.parametrize(
    ("command", "status", "cause", "remedy"),
    [
        (("train", "--stage", "auxiliary"), 2, "token choice needs no auxiliary routers", "it is causal"),
        (("train", "model.experts.token_choice=null", "train.steps=14"), 4, "token_choice was set, is None", "restore"),
        (
            ("train", "model.experts.token_choice.top_k=1", "train.steps=14"),
            2,
            r"model.experts.token_choice.top_k: 2 -> 1",
            "--yes",
        ),
    ],
    ids=["auxiliary stage", "expert choice", "other experts"],
)
def test_what_is_refused(command: tuple[str, ...], status: int, cause: str, remedy: str, runs: Path) -> None:
    first, *rest = command
    assert_says(mmscale(first, runs / "tc" / "config.yaml", *rest), status=status, cause=cause, remedy=remedy)
