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

from mmscale.config.load import dump, load, resolve
from mmscale.plan.siblings import siblings
from mmscale.report.compare import Comparison, compare
from mmscale.report.run_losses import ALL, VIEWS, View
from mmscale.runs.metrics import METRICS

ROOT = Path(__file__).parents[3]
FILE = ROOT / "docs" / "measurements" / "eta.json"
# Overrides of configs/equal_loss.yaml, as docs/eta.md has them.
SETTINGS = {
    "width 96": (),
    "width 32": (
        *("data.path=data/digits8", "data.prepare.augment=8", "model.hidden_size=32", "model.ffn_hidden_size=84"),
        *("train.micro_batch_size=16", "train.global_batch_size=16", "train.eval_every=40", "train.eval_batches=5"),
        "optim.lr=4e-3",
    ),
}


def rebuild(runs: dict[str, dict[str, Any]], overrides: tuple[str, ...], out: Path) -> list[Path]:
    """Run folders with the measured curves, in the order of the file."""
    base = load(ROOT / "configs" / "equal_loss.yaml", overrides)
    kinds = {one.config.run.name.partition("_")[2]: one.config for one in siblings(base)}
    for name, run in runs.items():
        config = kinds[name.rpartition("_s")[0]].model_dump(mode="json")
        (out / name).mkdir(parents=True)
        settings = resolve(config, [f"run.seed={run['seed']}"])
        (out / name / "config.yaml").write_text(dump(settings))
        lines = []
        for axis, prefix in (("training_step", "loss"), ("step", "eval/")):
            keys = [key for key in run if key.startswith(prefix)]
            columns = zip(*(run[key] for key in keys), strict=True)
            lines += [
                {"step": step, "attempt": 1} | dict(zip(keys, values, strict=True))
                for step, values in zip(run[axis], columns, strict=True)
            ]
        (out / name / METRICS).write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    return [out / name for name in runs]


@pytest.mark.parametrize("name", list(SETTINGS))
def test_published_ratios(tmp_path: Path, name: str) -> None:
    published = orjson.loads(FILE.read_bytes())["sets"][name]
    folders = rebuild(published["runs"], SETTINGS[name], tmp_path)
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
