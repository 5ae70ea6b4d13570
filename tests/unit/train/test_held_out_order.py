"""Held-out sets are read in the order that the run began with, whatever the configuration says now."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mmscale.tables.routings import Routing
from mmscale.train import held_out_evaluation
from mmscale.train.held_out_evaluation import HeldOutEvaluation


class Pass:
    """What the evaluation asks of a pass."""

    def __init__(self, order: str) -> None:
        self.order = order

    def like(self, *, order: str) -> Pass:
        return Pass(order)


@pytest.mark.parametrize(
    ("stream", "wanted"),
    [
        ([], "blocks"),
        ([{"order": "epochs"}, {"order": "epochs"}], "epochs"),
        ([{"start": 0}], "epochs"),  # of a checkpoint from before orders had names
        ([{"order": "blocks"}], "blocks"),
    ],
)
def test_the_order_is_the_runs(stream: list[dict[str, Any]], wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def evaluated(*_: Any, passes: dict[str, Pass], **__: Any) -> dict[str, dict[str, float]]:
        seen.extend(one.order for one in passes.values())
        return {}

    monkeypatch.setattr(held_out_evaluation, "evaluate_passes", evaluated)
    anything: Any = SimpleNamespace(stream=stream, step=1)
    passes: Any = {"": Pass("blocks"), "source/a": Pass("blocks")}
    evaluation = HeldOutEvaluation(
        anything,
        state=anything,
        stepper=anything,
        passes=passes,
        tasks={},
        groups=anything,
        beat=lambda: None,
        at=lambda *_: None,
        stop=anything,
        on_evaluation=lambda *_: None,
    )
    evaluation(Routing.BATCH)
    evaluation(Routing.BATCH)
    assert seen == [wanted] * 4
