"""The gate of exports whose experts and cut-offs are chosen in the less usual ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpoints_tools.huggingface.shipped.configuration_moma import ROUTINGS
from tests.end_to_end.running import ok
from tests.end_to_end.test_convert import MAIN, ROUTED, STAGE


@pytest.mark.long
def test_the_gate_of_averaged_cut_offs(config: Path, tmp_path: Path) -> None:
    """Competing experts, actual capacity and threshold routing together: no auxiliary routers are needed."""
    cutoffs = (*MAIN, *ROUTED, "model.experts.threshold_decay=0.9", "parallel.ep=1")
    ok("train", config, f"run.dir={tmp_path}", *cutoffs)
    run, folder = tmp_path / "tiny", tmp_path / "hf"
    ok("convert", "to-hf", run, folder, "--routing", "threshold")
    report = json.loads((folder / "conversion_report.json").read_text())
    assert report["model"]["routing"] == "threshold"
    gate = report["gate"]
    assert gate["passed"] and gate["problems"] == [] and gate["compared"] >= 6
    assert gate["max_abs"] < 1e-5 and gate["argmax_same"] == gate["tokens"] > 60
    settings = json.loads((folder / "config.json").read_text())
    assert settings["keeps_thresholds"] and settings["choice"] == "competitive"


@pytest.fixture(scope="module")
def averaging(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that can route in every way: with averaged cut-offs and auxiliary routers."""
    folder = tmp_path_factory.mktemp("averaging")
    routed = (config, f"run.dir={folder}", *MAIN, "model.experts.threshold_decay=0.9", "parallel.ep=1")
    ok("train", *routed)
    ok("train", *routed, *STAGE)
    return folder / "tiny"


@pytest.mark.exhaustive
@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_gate_generates_in_every_routing(routing: str, averaging: Path, tmp_path: Path) -> None:
    ok("convert", "to-hf", averaging, tmp_path / "hf", "--routing", routing)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["routing"] == routing
    report = json.loads((tmp_path / "hf" / "conversion_report.json").read_text())
    assert report["model"]["routing"] == routing and report["gate"]["generated"] > 6
    for row in report["generated"]:
        assert row["trainer"] and row["cached"] == row["uncached"] == row["batched"] == row["trainer"]
