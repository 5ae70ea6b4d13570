"""Prepares the charts of a report and the curves of their lines, once for the page and for its PNGs.

charts.py lists the charts, downsample.py shortens curves; nothing is drawn here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmscale.report.breaks import Cut, steps_of
from mmscale.report.charts import Chart, charts_of
from mmscale.report.downsample import POINTS, Curve, Downsampler
from mmscale.report.history import Floats, History

_MANY_RUNS = 4  # from so many on, curves have half the points


@dataclass(frozen=True)
class Curves:
    """Charts and their curves.

    Attributes:
        charts: in order; those that no run has measured anything of are there without lines.
        found: by number of the run and column; what was never measured is left out. Curves that were measured at the
            same rows have the same `at`.
    """

    charts: list[Chart]
    found: dict[tuple[int, str], Curve]


def curves_of(
    histories: Mapping[str, History],
    axes: Sequence[Mapping[str, Floats]],
    *,
    cuts: Sequence[Sequence[Cut]] | None = None,
) -> Curves:
    """The curves of all charts of some runs.

    Args:
        histories: figures of the runs by name.
        axes: of each run, in the same order.
        cuts: where curves of each run are broken, in the same order; schedules are not.
    """
    charts = charts_of(histories)
    points = POINTS if len(axes) < _MANY_RUNS else POINTS // 2
    samplers = [Downsampler(own, points=points) for own in axes]
    runs = list(histories.values())
    found: dict[tuple[int, str], Curve] = {}
    for chart, line in ((one, line) for one in charts for line in one.lines):
        breaks = () if cuts is None or chart.raw else steps_of(cuts[line.run], line.key)
        curve = samplers[line.run].curve(runs[line.run].of(line.key), names=line.names, breaks=breaks)
        if curve is not None:
            found[line.run, line.key] = curve
    return Curves(charts, found)
