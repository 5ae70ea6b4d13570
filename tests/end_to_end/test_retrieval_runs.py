"""A run with neighbours through the commands: retrieve, train, resume bit for bit, change the setting, evaluate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mmscale.runs.metrics import read_metrics
from tests.end_to_end.running import assert_says, mmscale, ok

STEADY = ("optim.schedule=constant", "optim.warmup=0", "checkpoint.every=3", "train.eval_every=0", "log.every=1")


def losses(run: Path) -> dict[int, float]:
    return {int(row["step"]): row["loss"] for row in read_metrics(run) if "loss" in row}


@pytest.mark.long
def test_a_run_with_neighbours(config: Path, digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(digits, folder)
    settings = (*STEADY, "parallel.ep=1", f"data.path={folder}", "data.retrieval.neighbours=2")

    def train(name: str, steps: int, *more: str) -> str:
        where = (f"run.dir={tmp_path}", f"run.name={name}", f"train.steps={steps}")
        ended = mmscale("train", config, *where, *settings, *more)
        assert ended.status == 0, ended
        return ended.out + ended.err

    refused = mmscale("train", config, f"run.dir={tmp_path}", "run.name=none", *settings)
    assert refused.status == 3 and "has no neighbours" in refused.err and "mmscale data retrieve" in refused.err
    found = json.loads(mmscale("data", "retrieve", folder, "--json").out)
    assert found["found"]["train"]["with_neighbours"] > 0
    assert mmscale("data", "verify", folder).status == 0
    train("whole", 6)
    train("parts", 3)
    train("parts", 6)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert "neighbours of the documents of" in train("parts", 8, "data.retrieval.neighbours=0", "--yes")
    evaluate = ("eval", tmp_path / "whole", "--batches", "4", "--json")
    measured = {
        one: json.loads(mmscale(*evaluate, "--neighbours", one).out)["loss"] for one in ("0", "1", "2", "random")
    }
    assert len(set(measured.values())) == 4, measured
    assert json.loads(mmscale(*evaluate).out)["loss"] == measured["0"]
    for wrong in ("9", "some"):
        assert mmscale("eval", tmp_path / "whole", "--neighbours", wrong).status == 2


@pytest.mark.long
def test_an_export_is_evaluated_with_neighbours_as_its_run(exported: Path, digits: Path, tmp_path: Path) -> None:
    """Also of a run that was not trained with any; the tiny model has experts and auxiliary routers."""
    folder = tmp_path / "data"
    shutil.copytree(digits, folder)
    ok("data", "retrieve", folder)

    def loss(model: str, neighbours: str) -> float:
        way = ("--routing", "causal", "--data", folder, "--batches", "2", "--neighbours", neighbours, "--json")
        found: float = json.loads(ok("eval", exported / model, *way))["loss"]
        return found

    for name, asked in (("dense", ("0", "1", "random")), ("tiny", ("2",))):
        of_run = [loss(name, one) for one in asked]
        assert [loss(f"{name}-hf", one) for one in asked] == pytest.approx(of_run, rel=1e-5)
        assert len(set(of_run)) == len(asked)
    ended = mmscale("eval", exported / "dense-hf", "--data", folder, "--neighbours", "9")
    assert_says(ended, status=2, cause="--neighbours 9 is out of range", remedy="from 0 to")
