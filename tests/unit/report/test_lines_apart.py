"""No two lines of a chart look alike: sets, routing modes and runs differ in colour, in shape, or in both."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mmscale.report.charts import charts_of
from mmscale.report.history import History, read
from mmscale.runs.held_out import AUXILIARY, HeldOut
from mmscale.train.log.metrics_log import MetricsLog

COLOURS, SHAPES = 6, 4
FIGURES = (
    "loss",
    "loss/text",
    "loss/image",
    "bits_per_byte/text",
    "conditional_loss/text_given_image",
    "accuracy/which",
)
SETS = ("", "source/icons", "source/gnome", "web")


def history(folder: Path, *, sets: tuple[str, ...], routings: tuple[str, ...], stage: bool) -> History:
    """A run that has measured every figure of some sets under some routing modes."""
    keys = [HeldOut(figure, routing, name) for figure in FIGURES for routing in routings for name in sets]
    keys += [HeldOut(figure, "causal", name, AUXILIARY) for figure in FIGURES for name in sets if stage]
    log = MetricsLog(folder, attempt=1)
    for step in (10, 20):
        log.write(step, {"loss": 1.0, "loss/text": 1.0, "loss/image": 1.0, **{one.key: 1.0 for one in keys}})
    log.close()
    return read(folder)


ROUTINGS: list[tuple[tuple[str, ...], bool]] = [
    (("batch",), False),
    (("batch",), True),
    (("batch", "causal"), False),
    (("batch", "causal"), True),
    (("batch", "threshold"), True),
    (("batch", "causal", "threshold"), True),
]
ROWS = [(runs, sets, routings, stage) for runs in (1, 2) for sets in (1, 3, 4) for routings, stage in ROUTINGS]


@pytest.mark.parametrize(("runs", "sets", "routings", "stage"), ROWS)
def test_every_line_has_a_look_of_its_own(
    runs: int, sets: int, routings: tuple[str, ...], stage: bool, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"sets": SETS[:sets], "routings": routings, "stage": stage}
    named = {f"run {number}": history(tmp_path / str(number), **given) for number in range(runs)}
    charts = charts_of(named)
    assert len({chart.name for chart in charts}) == len(charts)
    for chart in charts:
        lines = [line for line in chart.lines if line.points]
        looks = Counter((line.colour % COLOURS, line.mark % SHAPES) for line in lines)
        shown = [(line.label, line.colour, line.mark) for line in lines]
        assert max(looks.values(), default=1) == 1, (chart.name, shown)
