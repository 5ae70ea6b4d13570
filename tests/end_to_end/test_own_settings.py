"""A checkpoint is computed with its own settings, whatever the run's latest attempt was told; and a run that is done
writes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.end_to_end.running import Ended, listing, mmscale

ROPE = "model.rope_base=500000"


def ok(*arguments: str | Path) -> Ended:
    ended = mmscale(*arguments)
    assert ended.status == 0, ended
    return ended


def loss(run: str | Path, *more: str) -> float:
    found: dict[str, Any] = json.loads(ok("eval", run, "--batches", "2", "--json", *more).out)
    assert isinstance(found["loss"], float)
    return found["loss"]


def test_a_run_that_is_done_writes_nothing(config: Path, exported: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(exported / "tiny", tmp_path / "tiny"))
    before, measured = listing(run), loss(run, "--routing", "causal")
    settings = ("train.steps=30", "parallel.ep=1", "log.tensorboard=true", "log.every=7")
    ended = ok("train", config, f"run.dir={tmp_path}", *settings, ROPE, "--yes")
    assert "is done: 30 of 30 steps" in ended.err + ended.out
    assert [name for name, content in listing(run).items() if before.get(name) != content] in ([], ["lease.json"])
    assert loss(run, "--routing", "causal") == measured


@pytest.mark.long
def test_the_latest_attempt_s_settings_are_not_those_of_a_checkpoint(exported: Path, tmp_path: Path) -> None:
    """Evaluation and export, though config.yaml says something else."""
    run = Path(shutil.copytree(exported / "dense", tmp_path / "dense"))
    measured = loss(run)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["model"] |= {"rope_base": 5e5, "norm_eps": 1e-2}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert loss(run) == measured
    ok("convert", "to-hf", run, tmp_path / "hf")
    content = json.loads((tmp_path / "hf" / "config.json").read_text())
    rope = content.get("rope_theta") or content["rope_parameters"]["rope_theta"]
    assert (rope, content["rms_norm_eps"]) == (1e4, 1e-5)
    assert loss(tmp_path / "hf", "--routing", "causal") == pytest.approx(measured, rel=1e-5)


def test_each_step_of_a_run_is_what_it_was_trained_as(config: Path, tmp_path: Path) -> None:
    dense = ("run.name=dense", "model.kind=dense", "model.depth=null", "model.experts.counts={}", "parallel.ep=1")
    train = ("train", config, f"run.dir={tmp_path}", *dense, "checkpoint.asynchronous=false", "train.eval_every=0")
    train = (*train, "checkpoint.every=4", "optim.schedule=constant", "optim.warmup=1")
    ok(*train, "train.steps=4")
    run = tmp_path / "dense"
    first = loss(run)
    ok(*train, "train.steps=8", ROPE, "--yes")
    last = loss(run)
    assert loss(f"{run}@4") == first != last
    averaged = mmscale("ckpt", "average", f"{run}@4", f"{run}@8", tmp_path / "mean")
    assert averaged.status == 4 and "model.rope_base" in averaged.err
    (run / "config.yaml").unlink()  # the checkpoint knows all of it
    assert loss(run) == last
