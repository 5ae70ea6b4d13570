"""Renders an equal-loss comparison as text and as a picture: tables of ratios, and the step-matching plot of MoT.

compare.py computes the ratios.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmscale.report.compare import Comparison
from mmscale.report.equal_loss import matched
from mmscale.report.figure_style import COLOURS, GREY, dress, new_figure
from mmscale.report.run_losses import ALL, UNROUTED, Measure, Model, View

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TITLES: dict[View, str] = {
    "training": "training, batch routing",
    "held_out": "held out, batch routing",
    "causal": "held out, causal routing",
}


def render(found: Comparison) -> str:
    """Tables in Markdown, one for each loss, and the notes."""
    base = found.baseline
    lines = [f"Work of {_named(base)} over that of each model at the same loss (eta); above 1 the model needs less."]
    for view, meaning in found.views.items():
        rows = _rows(found, view)
        if not rows:
            continue
        head = ["model", f"{ALL}: loss", *(f"{part}: FLOPs" for part in found.parts), f"{ALL}: seconds"]
        at = f"at the loss of {base.name} after"
        lines += ["", f"{meaning}:", "", _row([head[0], at, *head[1:]]), _row(["---"] * (len(head) + 1)), *rows]
    if found.notes:
        lines += ["", *(f"note: {note}" for note in found.notes)]
    return "\n".join(lines)


def step_matching(found: Comparison) -> Figure:
    """For each loss and modality: FLOPs of each model against those of the baseline at the same loss.

    Both as shares of the baseline's total. The diagonal is the baseline itself; below it a model needs less.
    """
    views = [view for view in found.views if any(one.view == view for one in found.speedups)]
    figure = new_figure(width=1.2 + 3.1 * len(found.parts), height=0.7 + 2.9 * len(views))
    axes = figure.subplots(len(views), len(found.parts), squeeze=False, sharex=True)
    for row, view in enumerate(views):
        for column, part in enumerate(found.parts):
            _panel(axes[row][column], found, view, part)
            if row == 0:
                axes[row][column].set_title(part, fontsize=11)
        title = _TITLES[view] if found.views is not UNROUTED else UNROUTED[view]
        axes[row][0].set_ylabel(f"{title}\nFLOPs to the same loss", fontsize=9)
    for panel in axes[-1]:
        panel.set_xlabel(f"FLOPs of {found.baseline.name}, of its total", fontsize=9)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9)
    return figure


def _rows(found: Comparison, view: View) -> list[str]:
    rows = []
    shares = sorted({one.share for one in found.speedups if one.share is not None})
    for model in found.models:
        for share in shares:
            overall = found.find(model.name, view, ALL, "flops", share)
            cells = [_cell(found, model, view, part, "flops", share) for part in found.parts]
            if any(cells):
                loss = "" if overall is None else f"{overall.loss:.4f}"
                seconds = _cell(found, model, view, ALL, "seconds", share)
                rows.append(_row([_named(model), f"{share:.0%} of its FLOPs", loss, *cells, seconds]))
        rest = [
            one
            for one in found.speedups
            if (one.model, one.view, one.part, one.measure) == (model.name, view, ALL, "flops") and one.share is None
        ]
        for one in rest:
            cells = [str(one.ratio), *("" for _ in found.parts[1:]), ""]
            rows.append(_row([_named(model), "(this loss)", f"{one.loss:.4f}", *cells]))
    return rows


def _cell(found: Comparison, model: Model, view: View, part: str, measure: Measure, share: float) -> str:
    one = found.find(model.name, view, part, measure, share)
    return "" if one is None else str(one.ratio)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _named(model: Model) -> str:
    return model.name if len(model.runs) == 1 else f"{model.name} ({len(model.runs)} seeds)"


def _panel(axes: Axes, found: Comparison, view: View, part: str) -> None:
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1.0, linestyle="--", label=found.baseline.name)
    mine = found.baseline.curves(view, part, "flops")
    for number, model in enumerate(found.models):
        theirs = model.curves(view, part, "flops")
        if not mine or not theirs:
            continue
        total, colour = mine[0].total, COLOURS[number % len(COLOURS)]
        for curve in theirs[1:]:
            x, y = matched(mine[0], curve)
            axes.plot(x / total, y / total, color=colour, linewidth=0.7, alpha=0.35)
        x, y = matched(mine[0], theirs[0])
        axes.plot(x / total, y / total, color=colour, linewidth=1.7, label=model.name)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.25)
    dress(axes)
    axes.set_xticks(np.linspace(0, 1, 5), ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.set_yticks(np.linspace(0, 1.25, 6), ["0", "25 %", "50 %", "75 %", "100 %", "125 %"])
