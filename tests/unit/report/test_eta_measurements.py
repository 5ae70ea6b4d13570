"""The published ratios are what `mmscale compare` finds in the curves that were measured (docs/measurements).

Run folders are made of those curves again. They have no seconds: wall clock was not measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from docs.measurements.run_folders import rebuild
from mmscale.config.load import load
from mmscale.report.compare import Comparison, compare
from mmscale.report.run_losses import ALL, VIEWS, View

ROOT = Path(__file__).parents[3]
FILE = ROOT / "docs" / "measurements" / "eta.json"
# Overrides of configs/equal_loss.yaml, as docs/eta.md has them.
SETTINGS = {
    "width 96": (),
    "width 32": (
        *("data.path=data/digits8", "model.hidden_size=32", "model.ffn_hidden_size=84"),
        *("train.micro_batch_size=16", "train.global_batch_size=16", "train.eval_every=40", "train.eval_batches=5"),
        "optim.lr=4e-3",
    ),
}


@pytest.mark.parametrize("name", list(SETTINGS))
def test_published_ratios(tmp_path: Path, name: str) -> None:
    published = orjson.loads(FILE.read_bytes())["sets"][name]
    runs = {
        run: curves | {"model": run.rpartition("_s")[0], "settings": [f"run.seed={curves['seed']}"]}
        for run, curves in published["runs"].items()
    }
    folders = rebuild(runs, load(ROOT / "configs" / "equal_loss.yaml", SETTINGS[name]), tmp_path)
    comparison = compare(folders[0], folders[1:])
    found = comparison.as_dict()
    wanted = {key(one): one for one in published["compare"]["speedups"]}
    assert {key(one) for one in found["speedups"]} == set(wanted)
    for one in found["speedups"]:
        expected = wanted[key(one)]
        assert one["bound"] == expected["bound"], expected
        for value in ("loss", "ratio", "low", "high"):
            assert one[value] == pytest.approx(expected[value], abs=5.1e-5), expected
    text = (ROOT / "docs" / "eta.md").read_text()
    for row in rows(comparison):
        assert row in text, row


def rows(found: Comparison) -> Iterator[str]:
    """The rows of docs/eta.md about a comparison."""
    names: dict[View, str] = {"training": "training", "held_out": "held out", "causal": "**held out, causal**"}
    for view, model in itertools.product(VIEWS, found.models):
        seeds = f" ({len(model.runs)} seeds)" if len(model.runs) > 1 else ""
        at = ((ALL, 0.25), (ALL, 0.5), (ALL, 0.75), ("text", 0.5), ("image", 0.5))
        cells = [found.find(model.name, view, part, "flops", share) for part, share in at]
        ratios = [str(cell.ratio) for cell in cells if cell is not None]
        label = f"{model.name.rpartition('_s')[0]}{seeds}, {names[view]}"
        yield f"| {' | '.join([label, *ratios])} |"


def key(one: dict[str, Any]) -> tuple[Any, ...]:
    return one["model"], one["view"], one["modality"], one["measure"], one["share_of_baseline"]
