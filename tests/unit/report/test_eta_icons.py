"""The tables of docs/eta.md about the icons are those of the curves that were measured (docs/measurements)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from docs.measurements.run_folders import rebuild
from mmscale.config.load import load, resolve
from mmscale.plan.siblings import siblings
from mmscale.report.compare import Comparison, compare
from mmscale.report.run_losses import ALL
from tests.unit.report.test_eta_measurements import rows as ratio_rows

ROOT = Path(__file__).parents[3]
RUNS: dict[str, dict[str, Any]] = orjson.loads((ROOT / "docs" / "measurements" / "eta_icons.json").read_bytes())
PARTS = ("", "/text", "/image")
# Runs to the end, by model: with losses on the whole held-out split. The dense ones come first.
WHOLE = {name: run for name, run in RUNS.items() if "joint" in run}
STEPS: dict[str, Any] = orjson.loads((ROOT / "docs" / "measurements" / "eta_steps.json").read_bytes())["models"]
MODELS = sorted({name.rpartition("_s")[0] for name in WHOLE}, key=lambda name: (name != "dense", name))


def last(run: dict[str, Any], routing: str) -> str:
    """Last held-out losses: all / text / image."""
    return " / ".join(f"{run[f'eval/{routing}loss{part}'][-1]:.3f}" for part in PARTS)


def on_the_whole_split(model: str, stage: str, routing: str) -> str:
    """Losses at the end, means over seeds, and the range of the first one: all / text / image."""
    runs = [run[stage] for name, run in WHOLE.items() if name.rpartition("_s")[0] == model and stage in run]
    if not runs:
        return "the same"
    values = [[run[f"{routing}/loss{part}"] for run in runs] for part in PARTS]
    text = " / ".join(f"{statistics.mean(value):.3f}" for value in values)
    return f"{text} ({min(values[0]):.3f} to {max(values[0]):.3f})" if len(runs) > 1 else text


def rows() -> Iterator[str]:
    """The rows of the tables."""
    for model in MODELS:
        seeds = sum(name.rpartition("_s")[0] == model for name in WHOLE)
        named = model if seeds == 1 else f"{model} ({seeds} seeds)"
        cells = [("joint", "batch"), ("joint", "causal"), ("stage", "causal")]
        yield f"| {named} | {' | '.join(on_the_whole_split(model, *cell) for cell in cells)} |"
    for name, run in RUNS.items():
        if name.startswith("rate_dense_"):
            rate = name.removeprefix("rate_dense_")
            both = (run, RUNS[f"rate_4t4i_{rate}"])
            yield f"| {float(rate):g} | {both[0]['eval/loss'][-1]:.3f} | {both[1]['eval/loss'][-1]:.3f} |"
        elif name.startswith("choice_"):
            model, choice, capacity = name.split("_")[1:]
            yield f"| {model} | {choice} | {capacity} | {last(run, '')} | {last(run, 'causal/')} |"


def step_rows(comparison: Comparison) -> Iterator[str]:
    """CPU time of steps, and eta by it: that by FLOPs times the ratio of throughputs."""
    half_way = {model.name.rpartition("_s")[0]: model.name for model in comparison.models}
    for name, one in STEPS.items():
        seconds, throughput = one["seconds"], one["throughput_over_dense"]
        cell = comparison.find(half_way[name], "causal", ALL, "flops", 0.5) if name in half_way else None
        ratio = None if cell is None else cell.ratio.value
        if name == "dense":
            ratio = 1.0
        etas = "not run | not run" if ratio is None else f"{ratio:.2f} | {ratio * throughput['median']:.2f}"
        spread = f"{throughput['median']:.2f} ({throughput['min']:.2f} to {throughput['max']:.2f})"
        yield f"| {name} | {seconds['median']:.3f} | {spread} | {etas} |"


@pytest.mark.parametrize("row", list(rows()))
def test_the_page_has_the_measured_row(row: str) -> None:
    assert row in (ROOT / "docs" / "eta.md").read_text()


@pytest.mark.parametrize("name", list(RUNS))
def test_a_run_is_one_of_the_page(name: str) -> None:
    """Its settings load, and its curves have a value for each step."""
    run = RUNS[name]
    base = load(ROOT / "examples" / "icons" / "equal_loss.yaml")
    kinds = {one.name: one.config for one in siblings(base)}
    config = resolve(kinds[run["model"]].model_dump(mode="json"), run["settings"])
    assert run["step"][-1] == config.train.steps and run["step"] == sorted(set(run["step"]))
    for key, values in run.items():
        if key.startswith("eval/"):
            assert len(values) == len(run["step"]), key
        elif key.startswith("loss"):
            assert len(values) == len(run["training_step"]), key
    causal = config.model.auxiliary.mode == "joint"
    assert ("eval/causal/loss" in run) is causal


def test_the_ratios_of_the_page_are_those_of_the_curves(tmp_path: Path) -> None:
    names = [name for model in MODELS for name in sorted(WHOLE) if name.rpartition("_s")[0] == model]
    base = load(ROOT / "examples" / "icons" / "equal_loss.yaml")
    folders = rebuild({name: WHOLE[name] for name in names}, base, tmp_path)
    text = (ROOT / "docs" / "eta.md").read_text()
    comparison = compare(folders[0], folders[1:])
    for row in (*ratio_rows(comparison), *step_rows(comparison)):
        assert row in text, row
