"""Routers that take no token of a modality are named: by `mmscale eval`, by the stage at its end, and on the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmscale.cli.evaluate import _evaluation
from mmscale.report.facts import notes
from mmscale.report.history import read
from mmscale.runs.silent_routers import silent_routers
from tests.unit.report.test_stage_losses import STEPS, Way, add_stage, run_of


def row(layer: int, modality: str, taken: float, of: float = 2.0, *, kind: str = "experts") -> dict[str, Any]:
    ratios = {"accuracy": 0.5, "recall": taken / of if of else 0.0, "per_token": taken, "per_token_batch": of}
    return {"layer": layer, "kind": kind, "modality": modality, **ratios}


ALL = [row(0, "audio", 0.0), row(1, "audio", 0.0), row(0, "text", 1.5), row(1, "text", 0.001)]


@pytest.mark.parametrize(("rows", "said"), [
    (ALL, ["causal routers of experts take no token of audio in any layer"]),
    ([row(0, "audio", 0.0), row(3, "audio", 1.0)], ["experts take no token of audio in 1 layer of 2 (0)"]),
    ([row(n, "audio", float(n == 1)) for n in range(3)], ["experts take no token of audio in 2 layers of 3 (0, 2)"]),
    ([row(0, "audio", 0.0, kind="depth")], ["Mixture-of-Depths layers take no token of audio in any layer"]),
    ([row(0, "audio", 0.0, of=0.0)], []),  # nor does batch routing
    ([{"layer": 0, "kind": "experts", "modality": "audio"}], []),  # the batches have no such token
    ([], []),
])  # fmt: skip
def test_the_sentence(rows: list[dict[str, Any]], said: list[str]) -> None:
    found = silent_routers(rows)
    assert len(found) == len(said) and all(part in line for part, line in zip(said, found, strict=True))


def test_eval_and_the_page_say_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = silent_routers(ALL)[0]
    _evaluation({"routing": "causal", "routers": ALL})
    assert wanted in " ".join(capsys.readouterr().out.split())
    run = run_of(tmp_path / "run", Way())
    add_stage(run, main_step=STEPS, routers=ALL)
    assert f"run: after the auxiliary stage, {wanted}." in notes({"run": run}, {"run": read(run)}, {"run": {}})
