"""The comparison of dense, mixed, grouped and untied models at equal FLOPs: baselines, a run of each, compare."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end.running import ok

NAMES = ("dense", "1t1i", "moe8x", "4t4i", "mot", "mot_4t1i")


@pytest.mark.exhaustive
def test_every_model_of_the_comparison(config: Path, tmp_path: Path) -> None:
    given = ("model.depth=null", "parallel.ep=1", f"run.dir={tmp_path / 'runs'}", "train.steps=6", "train.eval_every=3")
    out = tmp_path / "baselines"
    options = ("--experts", "4", "--tolerance", "0.05", "--json")
    made = json.loads(ok("baselines", config, *given, "--out", out, *options))
    files = {entry["name"]: entry["file"] for entry in made["siblings"]}
    flops = {entry["name"]: entry["flops_per_token"] for entry in made["siblings"] if entry["name"] in NAMES}
    assert max(flops.values()) < 1.05 * min(flops.values())
    for name in NAMES:
        ok("train", files[name], "checkpoint.every=0", "checkpoint.asynchronous=false")
    runs = [tmp_path / "runs" / Path(files[name]).stem for name in NAMES]
    found = json.loads(ok("compare", runs[0], *runs, "--at", "0.5,1", "--json"))
    text = json.dumps(found)
    assert all(run.name in text for run in runs)
