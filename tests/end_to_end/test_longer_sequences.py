"""A run whose sequences become longer: positions are stretched, data goes on, the export computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmscale.runs.metrics import read_metrics
from tests.end_to_end.running import assert_says, mmscale, ok

DENSE = ("run.name=dense", "model.kind=dense", "model.depth=null", "model.experts.counts={}", "parallel.ep=1")
SHORT = ("model.seq_length=64", "train.steps=4")
LONG = (
    "model.seq_length=128",
    "model.rope_scaling={rope_type: yarn, factor: 2, original_max_position_embeddings: 64}",
    "train.steps=8",
)


@pytest.mark.long
def test_a_run_goes_on_with_longer_sequences_and_yarn(config: Path, tmp_path: Path) -> None:
    train = ("train", config, f"run.dir={tmp_path}", *DENSE, "checkpoint.asynchronous=false", "train.eval_every=0")
    train = (*train, "checkpoint.every=4", "optim.schedule=constant", "optim.warmup=1")
    short = mmscale(*train, *SHORT)
    assert short.status == 0, short
    refused = mmscale(*train, *LONG)
    assert_says(refused, status=2, cause=r"model\.rope_scaling: null -> .*yarn", remedy="--yes")
    assert "model.seq_length: 64 -> 128" in refused.err
    longer = mmscale(*train, *LONG, "--yes")
    assert longer.status == 0, longer
    assert "no document is read twice" in longer.err
    run = tmp_path / "dense"
    steps = [line for line in read_metrics(run) if "loss" in line]
    assert [line["step"] for line in steps] == [*range(1, 9)]
    trained = [line["tokens"] for line in steps]
    assert trained[3] <= 4 * 4 * 64 and trained[-1] - trained[-2] > 4 * 64  # loss over more than short sequences hold
    each = np.diff([line["flops"] for line in steps], prepend=0) / np.diff(trained, prepend=0)
    assert each[:4] == pytest.approx(each[0]) and each[4:] == pytest.approx(each[4])
    assert each[4] > 1.05 * each[0]  # attention among more tokens
    exported = mmscale("convert", "to-hf", run, tmp_path / "hf")
    assert exported.status == 0, exported
    gate = json.loads((tmp_path / "hf" / "conversion_report.json").read_text())["gate"]
    assert gate["passed"] and gate["max_abs"] < 1e-5
    content = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert content["max_position_embeddings"] == 128
    assert content["rope_parameters"] == {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": True,
    }


@pytest.mark.long
@pytest.mark.parametrize("routers", ["joint", pytest.param("stage", marks=pytest.mark.exhaustive)])
def test_causal_numbers_after_longer_sequences(routers: str, config: Path, tmp_path: Path) -> None:
    """Thresholds and auxiliary routers: the run's own losses, those of `eval` and the export's are the same."""
    train = ("train", config, f"run.dir={tmp_path}", "model.experts.threshold_decay=0.9", "parallel.ep=1")
    train = (*train, "checkpoint.asynchronous=false", "checkpoint.every=0", "train.eval_every=8")
    train = (*train, "optim.schedule=constant", "optim.warmup=1", "optim.lr=1e-2")
    if routers == "joint":
        train = (*train, "model.auxiliary.mode=joint")
    ok(*train, *SHORT)
    ok(*train, *LONG, "--yes")
    run = tmp_path / "tiny"
    own = {mode: read_metrics(run)[-1].get(f"eval/{mode}/loss") for mode in ("threshold", "causal")}
    if routers == "stage":
        ok(*train, *LONG, "--stage", "auxiliary", "auxiliary.steps=6", "auxiliary.optim.lr=1e-2")
        report = json.loads((run / "auxiliary/report.json").read_text())["held_out"]
        assert report["batch"]["loss"] == pytest.approx(read_metrics(run)[-1]["eval/loss"], rel=1e-6)
        own["causal"] = report["causal"]["loss"]
    for mode, recorded in own.items():
        found = evaluated(run, mode)
        assert recorded == pytest.approx(found["loss"], rel=1e-6), mode
        assert found["batch"]["loss"] == pytest.approx(read_metrics(run)[-1]["eval/loss"], rel=1e-6)
        ok("convert", "to-hf", run, tmp_path / mode, "--routing", mode, timeout_s=400)
        assert evaluated(tmp_path / mode, mode)["loss"] == pytest.approx(found["loss"], rel=2e-6), mode


def evaluated(model: Path, mode: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ok("eval", model, "--routing", mode, "--batches", "2", "--json"))
    return found
