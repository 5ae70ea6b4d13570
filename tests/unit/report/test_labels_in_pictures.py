"""Labels of breaks stay inside their panel, and a dashed level is named, in PNGs as on the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.goodput import goodput
from mmscale.report import page, pictures
from mmscale.report.chart import Chart, Level
from mmscale.report.figure_style import mark_cuts, new_figure
from tests.unit.report.test_page import make_run, with_a_task

TEXT = "changed: data, batch, sequence length"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_a_label_is_inside_its_panel(share: float) -> None:
    figure = new_figure(width=10.0, height=4.0)
    axes = figure.add_subplot()
    axes.plot([0, 1000], [2.0, 1.0])
    mark_cuts(axes, [(1000 * share, TEXT)])
    figure.canvas.draw()
    (label,) = [one for one in axes.texts if one.get_text() == TEXT]
    own, panel = label.get_window_extent(), axes.get_window_extent()
    assert panel.x0 <= own.x0 and own.x1 <= panel.x1


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("places", [(500, 510), (100, 130, 160), (690, 710, 950), (0, 1000), (300, 300), (590, 610)])
def test_labels_of_neighbouring_breaks_do_not_touch(places: tuple[int, ...], columns: int) -> None:
    figure = new_figure(width=10.0, height=4.0)
    axes = figure.add_subplot(figure.add_gridspec(1, columns)[0, 0])
    axes.plot([0, 1000], [2.0, 1.0])
    mark_cuts(axes, [(place, TEXT[: 36 - 3 * number]) for number, place in enumerate(places)])
    figure.canvas.draw()
    boxes = [one.get_window_extent() for one in axes.texts]
    assert len(boxes) == len(places)
    assert not any(a.overlaps(b) for number, a in enumerate(boxes) for b in boxes[number + 1 :])


def test_guessing_is_in_the_legend_of_a_single_line(tmp_path: Path) -> None:
    runs = page.read_runs([with_a_task(make_run(tmp_path / "run", resumed_at=20))], goodput=goodput)
    drawn = page.curves(runs)
    (chart,) = [one for one in drawn.charts if one.name == "accuracy_which"]
    single = Chart(**{**vars(chart), "lines": chart.lines[:1], "levels": (Level(0, 0.1, "guessing"),)})
    axes = new_figure(width=5.0, height=3.0).add_subplot()
    pictures._draw_chart(axes, single, drawn, runs)
    legend = axes.get_legend()
    assert legend is not None and "guessing" in [text.get_text() for text in legend.get_texts()]
