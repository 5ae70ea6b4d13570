"""Causal masking through the commands: train, resume, other layouts, fill holes with the run and its export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
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


@pytest.fixture(scope="module")
def models(masked: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A run, its export, and a drawn digit."""
    folder = tmp_path_factory.mktemp("models")
    trained(masked, folder, "train.steps=30", "train.eval_every=0", "checkpoint.every=0")
    ok("convert", "to-hf", folder / "masked", folder / "hf", timeout_s=600)
    picture = folder / "picture.png"
    pixels = np.add.outer(np.arange(8), np.arange(8)) * 18
    PIL.Image.fromarray(pixels.astype(np.uint8)).save(picture)
    return folder / "masked", folder / "hf", picture


def infilled(model: Path, *arguments: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ok("sample", model, *arguments, "--json"))
    return found


def test_run_and_export_fill_holes_alike(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    run, export, picture = models
    ways: list[tuple[str | Path, ...]] = [
        ("--infill", "<hole> seven and <hole>", "--count", "3", "--max-tokens", "5"),
        ("--infill", "a <hole>", "--image", picture, "--mask", "0,1,1,1", "--count", "1", "--max-tokens", "4"),
    ]
    for way in ways:
        one, other = (infilled(model, *way, "--out", tmp_path / model.name) for model in (run, export))
        kept = [
            [(sample["text"], sample["tokens"], sample["ended"]) for sample in found["samples"]]
            for found in (one, other)
        ]
        assert kept[0] == kept[1] and len(kept[0]) == len(one["samples"])
        for mine, theirs in zip(one["images"], other["images"], strict=True):
            assert Path(mine).read_bytes() == Path(theirs).read_bytes()
    continued = infilled(run, "--prompt", "a", "--count", "1", "--max-tokens", "3", "--out", tmp_path / "continued")
    assert [sample["prompt"] for sample in continued["samples"]] == ["a"]
    (filled,) = one["images"]
    plain = infilled(run, "--infill", "a <hole>", "--image", picture, "--count", "1", "--out", tmp_path / "plain")
    before, after = (np.asarray(PIL.Image.open(file)) for file in (plain["images"][0], filled))
    assert (before[:4] == after[:4]).all() and (before[:, 4:] == after[:, 4:]).all()


def test_the_processor_of_an_export_fills_holes_alike(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Token by token what the command gives, with what an export's user loads."""
    import torch
    from transformers import AutoModelForCausalLM, AutoProcessor

    run, export, picture = models
    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(export, trust_remote_code=True)
    content = ["a ", processor.HOLE, " seven", {"type": "image", "image": picture, "mask": (0, 0, 2, 1)}]
    pieces = processor.infill(model, content, do_sample=False, max_new_tokens=6)
    way = ("--infill", "a <hole> seven<image>", "--image", picture, "--mask", "0,0,2,1", "--max-tokens", "6")
    (sample,) = infilled(run, *way, "--temperature", "0", "--count", "1", "--out", tmp_path)["samples"]
    texts, pictures = ([piece for piece in pieces if isinstance(piece, str) is kind] for kind in (True, False))
    assert "".join(texts) == sample["text"]
    assert (np.asarray(pictures[0]) == np.asarray(PIL.Image.open(sample["pieces"][-1]["image"]))).all()


def test_holes_that_cannot_be_filled(models: tuple[Path, Path, Path], masked: Path, tmp_path: Path) -> None:
    run, _, picture = models

    def refused(model: Path, *arguments: str | Path, cause: str, remedy: str) -> None:
        ended = mmscale("sample", model, *arguments, "--out", tmp_path / "out")
        assert_says(ended, status=2, cause=cause, remedy=remedy)
        assert not (tmp_path / "out").exists()

    whole = ("--infill", "a", "--image", picture, "--mask", "0,0,1,1")
    refused(run, cause="--prompt and --infill are neither given", remedy="one of them")
    refused(run, *whole, "--prompt", "a", cause="both given", remedy="one of them")
    refused(run, *whole, "--draw", cause="--draw: not with --infill", remedy="leave it away")
    refused(run, "--infill", "a", cause="no hole to fill", remedy="write <hole> in the text")
    refused(run, *whole[:-1], "1,1,2,1", cause="mask 1,1,2,1 is not inside the image of 2 x 2", remedy="--mask")
    refused(run, *whole[:-1], "1,1", cause="'1,1' is not X,Y,WIDTH,HEIGHT", remedy="for example")
    refused(run, "--infill", "<hole>", "--mask", "0,0,1,1", cause="--mask is given with 0 pictures", remedy="--image")
    refused(run, "--prompt", "a", "--mask", "0,0,1,1", cause="without --infill", remedy="--infill")
    dense = ("--infill", "a <hole>")
    trained(masked, tmp_path / "plain", "train.steps=1", "train.eval_every=0", "objective.cm3_rate=0")
    refused(tmp_path / "plain/masked", *dense, cause="not trained to fill holes", remedy="objective.cm3_rate")
    trained(masked, tmp_path / "whole", "train.steps=1", "train.eval_every=0", "objective.image_spans=whole")
    refused(tmp_path / "whole/masked", *whole, cause="image_spans is whole", remedy="0,0,2,2")
