"""The tables of docs/eta.md about the icons are those of the curves that were measured (docs/measurements)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from mmscale.config.load import load, resolve
from mmscale.plan.siblings import siblings

ROOT = Path(__file__).parents[3]
RUNS: dict[str, dict[str, Any]] = orjson.loads((ROOT / "docs" / "measurements" / "eta_icons.json").read_bytes())
PARTS = ("", "/text", "/image")


def last(run: dict[str, Any], routing: str) -> str:
    """Last held-out losses: all / text / image."""
    return " / ".join(f"{run[f'eval/{routing}loss{part}'][-1]:.3f}" for part in PARTS)


def rows() -> Iterator[str]:
    """The rows of the tables."""
    yield f"| dense | {last(RUNS['dense_s1'], '')} | the same |"
    both = RUNS["4t4i_s1_joint"]
    yield f"| 4t4i | {last(both, '')} | {last(both, 'causal/')} |"
    for name, run in RUNS.items():
        if name.startswith("rate_dense_"):
            rate = name.removeprefix("rate_dense_")
            both = (run, RUNS[f"rate_4t4i_{rate}"])
            yield f"| {float(rate):g} | {both[0]['eval/loss'][-1]:.3f} | {both[1]['eval/loss'][-1]:.3f} |"
        elif name.startswith("choice_"):
            model, choice, capacity = name.split("_")[1:]
            yield f"| {model} | {choice} | {capacity} | {last(run, '')} | {last(run, 'causal/')} |"


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
