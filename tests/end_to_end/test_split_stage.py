"""The stage of auxiliary routers with split sequences (`parallel.cp`), after a main run without: as in one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mmscale.runs.metrics import read_metrics
from tests.end_to_end.running import mmscale

STAGE = ("--stage", "auxiliary", "auxiliary.steps=6", "auxiliary.optim.lr=1e-2", "auxiliary.calibration_batches=2")
MAIN = ("train.steps=30", "parallel.ep=1", "data.document_multiple=4", "checkpoint.asynchronous=false")


def test_routers_learn_from_split_sequences(config: Path, exported: Path, tmp_path: Path) -> None:
    losses, reports = [], []
    for ranks in (1, 2):
        run = Path(shutil.copytree(exported / "bare", tmp_path / str(ranks) / "tiny"))
        stage = ("train", config, f"run.dir={run.parent}", *MAIN, *STAGE, f"parallel.cp={ranks}")
        ended = mmscale(*stage, nproc=ranks)
        assert ended.status == 0, ended
        losses.append([line["loss"] for line in read_metrics(run / "auxiliary") if "loss" in line])
        reports.append(json.loads((run / "auxiliary" / "report.json").read_text()))
    # A choice within rounding of another may fall differently, and changes these by less.
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], rel=1e-3)
    alone, split = reports
    for routing in ("batch", "causal"):
        assert split["held_out"][routing]["loss"] == pytest.approx(alone["held_out"][routing]["loss"], rel=1e-2)
    assert [row["kind"] for row in split["routers"]] == [row["kind"] for row in alone["routers"]]
