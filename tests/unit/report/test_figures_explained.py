"""Figures that were misread say what they are: in the report, and beside the numbers of `mmscale eval`."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmscale.cli.evaluate import _shown
from mmscale.train.log.metrics_log import MetricsLog
from tests.unit.report.test_page import data_of, make_run, written

# Chart, and words that stand in it: title, unit, note or label of the line.
EXPLAINED = {
    "z_loss": ("z_loss", "(log Z)²", "Mean square of the log of the softmax's denominator."),
    "step_time_saving_s": ("waits", "s", "step while a save runs"),
    "data_wait_s": ("waits", "s", "of it: waiting for data"),
    "output_norm": ("output_norm", "", "Growth without end comes before divergence"),
    "experts/text/unrouted_fraction": ("unrouted", "", "they pass by the experts unchanged"),
}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("explained")
    run = make_run(folder / "run")
    log = MetricsLog(run, attempt=2)
    log.write(31, {"step_time_saving_s": 2.5, "loss": 0.1, "time": 1100.0})
    log.close()
    return written([run], folder / "report.html")


@pytest.mark.parametrize("figure", EXPLAINED)
def test_a_chart_explains_its_figure(figure: str, page: str) -> None:
    name, unit, words = EXPLAINED[figure]
    (chart,) = (one for one in data_of(page)["charts"] if one["name"] == name)
    (line,) = (one for one in chart["lines"] if one["key"] == figure)
    assert chart["unit"] == unit and words in f"{chart['title']} {chart['note']} {line['label']}"


@pytest.mark.parametrize("key", ["z_loss", "source/web/z_loss", "validation/web/z_loss"])
def test_eval_explains_the_z_loss(key: str) -> None:
    assert _shown(key) == f"{key} = mean of (log Z)²"


def test_the_reference_gives_the_example_that_was_asked_about() -> None:
    page = (Path(__file__).parents[3] / "docs/reference/metrics.md").read_text()
    (row,) = (line for line in page.splitlines() if line.startswith("| `z_loss`"))
    assert "111 means logits whose exponentials sum to e^10.5" in row
    (row,) = (line for line in page.splitlines() if line.startswith("| `step_time_saving_s`"))
    assert "while a save was running" in row
