"""Shows how often runs have read each of their data sets, and how often they will have.

Passes over each data set of a run, done and planned: a figure and a table for the page, and the figure as PNG. The
numbers come from runs/sources_read.py.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from mmscale.report.facts import step_reached
from mmscale.report.figure_style import COLOURS, GREY, dress, new_figure, save_figure
from mmscale.report.page import Run
from mmscale.runs.sources_read import SourceRead, sources_read
from mmscale.train.log.progress_lines import count

HEADING = "Data sets"
_MOST = 40  # data sets in the figure
_LONGEST = 36  # letters of a path beside it


def read_of(run: Run) -> list[SourceRead]:
    """The data sets of a run; empty if it did not write them."""
    return sources_read(run.events, step=step_reached(run.history, run.events))


def sources_section(runs: Sequence[Run]) -> str:
    """The figure and a table; empty if no run wrote what it needs."""
    found = [(run.name, source) for run in runs for source in read_of(run)]
    if not found:
        return ""
    picture = io.BytesIO()
    save_figure(passes_figure(runs), picture)
    encoded = base64.b64encode(picture.getvalue()).decode()
    image = f'<img alt="passes" style="max-width:100%;border-radius:8px" src="data:image/png;base64,{encoded}">'
    head = (
        "run",
        "data set",
        "tokens of a pass",
        "passes done",
        "planned",
        "limit",
        "tokens read",
        "repeated documents",
    )
    rows = [
        (
            name,
            one.path,
            " + ".join(f"{count:,} {modality}" for modality, count in one.tokens.items()),
            f"{one.done:.2f}",
            f"{one.planned:.2f}",
            "-" if one.max_epochs is None else str(one.max_epochs),
            f"about {count(one.tokens_done)}",
            "-" if one.repeated is None else f"{one.repeated:.1%}",
        )
        for name, one in found
    ]
    titles = "".join(f"<th>{title}</th>" for title in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'{image}<div class="table"><table><thead><tr>{titles}</tr></thead>{body}</table></div>'


def write_passes(runs: Sequence[Run], out: Path) -> list[Path]:
    """The figure beside the page as `<stem>_data.png`; nothing if no run wrote what it needs."""
    if not any(read_of(run) for run in runs):
        return []
    file = out.with_name(f"{out.stem}_data.png")
    save_figure(passes_figure(runs), file)
    return [file]


def passes_figure(runs: Sequence[Run]) -> Figure:
    """Bars: passes over each data set, planned as outlines, done filled, the limit as a mark."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    found = [(run, source) for run in runs for source in read_of(run)][:_MOST]
    figure = new_figure(width=8.0, height=1.1 + 0.36 * len(found))
    axes = figure.add_subplot()
    dress(axes)
    axes.grid(visible=False, axis="y")
    for row, (run, one) in enumerate(found):
        colour = COLOURS[list(runs).index(run) % len(COLOURS)]
        axes.barh(row, one.planned, height=0.62, facecolor="none", edgecolor=GREY, linewidth=1.0, zorder=3)
        axes.barh(row, one.done, height=0.62, color=colour, zorder=2)
        if one.max_epochs is not None:
            axes.plot([one.max_epochs] * 2, [row - 0.42, row + 0.42], color="#c62828", linewidth=2.0, zorder=4)
    names = [one.path if len(runs) == 1 else f"{run.name}: {one.path}" for run, one in found]
    short = [name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}" for name in names]
    axes.set_yticks(range(len(found)), short)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel("passes over the data set since the beginning of the run", fontsize=8.5)
    handles: list[Patch | Line2D] = [
        Patch(color=COLOURS[0], label="done"),
        Patch(facecolor="none", edgecolor=GREY, label="planned"),
    ]
    if any(one.max_epochs is not None for _, one in found):
        handles.append(Line2D([], [], color="#c62828", linewidth=2.0, label="max_epochs"))
    axes.legend(handles=handles, frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return figure
