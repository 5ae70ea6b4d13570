"""Prepares the charts of a report and the curves of their lines, once for the page and for its PNGs.

charts.py lists the charts, downsample.py shortens curves; nothing is drawn here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmscale.report.accuracy_charts import Guessing
from mmscale.report.breaks import Cut, steps_of
from mmscale.report.chart import Chart
from mmscale.report.charts import charts_of
from mmscale.report.downsample import POINTS, Curve, Downsampler
from mmscale.report.held_out_parts import HeldOutParts, with_parts
from mmscale.report.history import Floats, History

_MANY_RUNS = 4  # with this number of runs or more, curves have half the points


@dataclass(frozen=True)
class Curves:
    """Charts and their curves.

    Attributes:
        charts: in order; those without any measurement have no lines.
        found: by number of the run and column; columns without a measurement are omitted. Curves measured at the same
            rows share `at`.
    """

    charts: list[Chart]
    found: dict[tuple[int, str], Curve]


def curves_of(
    histories: Mapping[str, History],
    axes: Sequence[Mapping[str, Floats]],
    *,
    cuts: Sequence[Sequence[Cut]] | None = None,
    guessing: Sequence[Mapping[str, Sequence[Guessing]]] = (),
    parts: Sequence[HeldOutParts] = (),
) -> Curves:
    """The curves of all charts of some runs.

    Args:
        histories: metrics of the runs by name.
        axes: of each run, in the same order.
        cuts: breaks of each run, in the same order.
        guessing: accuracies of guessing of each run, in the same order.
        parts: of held-out sets that each run read, in the same order; empty: unknown.
    """
    charts = with_parts(charts_of(histories, guessing=guessing), histories, parts)
    points = POINTS if len(axes) < _MANY_RUNS else POINTS // 2
    samplers = [Downsampler(own, points=points) for own in axes]
    runs = list(histories.values())
    found: dict[tuple[int, str], Curve] = {}
    for line in (line for one in charts for line in one.lines):
        breaks = () if cuts is None else steps_of(cuts[line.run], line.key)
        curve = samplers[line.run].curve(runs[line.run].of(line.key), names=line.names, breaks=breaks)
        if curve is not None:
            found[line.run, line.key] = curve
    return Curves(charts, found)
