"""Draws the figures of the report page as PNG files with matplotlib, for slides and papers.

The same charts and numbers as on the page. charts.py, layers.py and timeline.py define what is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmscale.report.chart import Chart, Level
from mmscale.report.charts import modalities_of
from mmscale.report.curves import Curves
from mmscale.report.downsample import Curve
from mmscale.report.figure_style import (
    COLOURS,
    GREY,
    MARKS,
    clock_unit,
    dress,
    engineering,
    legend_below,
    legend_height,
    log_scale,
    mark_cuts,
    new_figure,
    note_above,
    save_figure,
    whole_steps,
    width_of_share,
)
from mmscale.report.figures import smoothed
from mmscale.report.history import Floats
from mmscale.report.page import Run, curves
from mmscale.report.timeline import crosses
from mmscale.runs.display_names import TIME_PARTS

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

_SPANS = {"steps": "#3a9b5c", "start_up": "#8aa4c8", "lost": "#d55e00"}
# A mark for events: symbol, size, colour, meaning.
_SAVED = ("|", 5, GREY, "checkpoint saved")
_STOPPED = ("s", 4, "#7a7a7a", "stopped on request")
_UNUSUAL = ("x", 5, "#c62828", "")  # crosses() has its meaning
# Of figures of layers over a run, by title.
_SCALES = {
    "no expert took": "fraction of the tokens",
    "depth, processed": "fraction of the tokens",
    "output norm": "mean norm",
}
_RING = "A ring marks the lowest held-out value."
_WIDTH = 10.0  # of pictures of charts [inches]
_MANY_MARKS = 80
_SHOWN_LAYER_MAPS = 24  # largest number of co-selection matrices of a modality in a picture


def write_pictures(runs: Sequence[Run], out: Path, *, drawn: Curves | None = None) -> list[Path]:
    """One PNG for every part of the page, next to it: `<stem>_loss.png` and so on.

    Args:
        runs: from `page.read_runs`.
        out: the page's file.
        drawn: from `page.curves`; None: they are made here.

    Returns:
        The files, in the page's order; parts for which no run has data are omitted.
    """
    files = []
    drawn = drawn or curves(runs)
    for section in dict.fromkeys(chart.section for chart in drawn.charts):
        own = [chart for chart in drawn.charts if chart.section == section and chart.lines]
        if own:
            files.append(_beside(out, section.lower().replace(" ", "_")))
            _draw_charts(own, drawn, runs, files[-1])
    for run in runs:
        suffix = "" if len(runs) == 1 else f"_{runs.index(run) + 1}"
        if run.layers:
            files += _draw_layers(run, out, suffix=suffix)
    if any(run.timeline.spans for run in runs):
        files.append(_beside(out, "timeline"))
        _draw_timelines([run for run in runs if run.timeline.spans], files[-1])
    return files


def _beside(out: Path, name: str) -> Path:
    return out.with_name(f"{out.stem}_{name}.png")


def _draw_charts(charts: Sequence[Chart], drawn: Curves, runs: Sequence[Run], file: Path) -> None:
    columns = 1 if len(charts) == 1 else 2
    wide = charts[0].wide and len(charts) > 1
    cells = len(charts) + wide
    rows = -(-cells // columns)
    places = [number + (wide and number > 0) for number in range(len(charts))]
    heights = [3.9 if rows == 1 else 2.9] * rows
    for row in range(rows):
        own = [chart for place, chart in zip(places, charts, strict=True) if place // columns == row]
        heights[row] += max(_legend_height(chart, 1.0 if len(own) == 1 else 1 / columns) for chart in own)
    figure = new_figure(width=_WIDTH, height=sum(heights))
    grid = figure.add_gridspec(rows, columns, height_ratios=heights)
    for number, (place, chart) in enumerate(zip(places, charts, strict=True)):
        cell = grid[0, :] if wide and number == 0 else grid[place // columns, place % columns]
        _draw_chart(figure.add_subplot(cell), chart, drawn, runs)
    save_figure(figure, file)


def _legend_height(chart: Chart, share: float) -> float:
    """Of a chart in a panel with a share of the width [inches]."""
    labels = [*(one.label for one in chart.lines), *(one.label for one in chart.levels)]
    return legend_height(labels, width_of_share(_WIDTH, share)) if len(labels) > 1 else 0.0


def _draw_chart(axes: Axes, chart: Chart, drawn: Curves, runs: Sequence[Run]) -> None:
    cuts = [(cut.step, cut.text) for line in chart.lines for cut in runs[line.run].cuts if cut.breaks(line.key)]
    for line in chart.lines:
        curve = drawn.found.get((line.run, line.key))
        if curve is None:
            continue
        colour, steps = COLOURS[line.colour % len(COLOURS)], curve.with_gaps(curve.at["step"])
        low, mean, high = (curve.with_gaps(values) for values in (curve.low, curve.mean, curve.high))
        if not curve.exact and (line.joined or not line.points):
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        elif not curve.exact:
            # A point may stand for many pauses, so a stem shows the range from the lowest to the highest.
            axes.vlines(steps, low, high, color=colour, linewidth=0.9, alpha=0.6)
        if line.points:
            mark = MARKS[line.mark % len(MARKS)]
            style = ":" if line.joined else "none"
            axes.plot(
                steps,
                mean,
                marker=mark,
                color=colour,
                linestyle=style,
                linewidth=0.8,
                markersize=4.5,
                # So that marks at the same place are all visible, the first shape is half transparent, others are
                # outlines.
                markerfacecolor="none" if line.mark % len(MARKS) else (colour, 0.45),
                markeredgecolor=colour,
                markeredgewidth=1.1 if len(steps) <= _MANY_MARKS else 0.5,
                label=line.label,
            )
            last = curve.pieces()[-1]
            if line.best and np.isfinite(curve.mean[last]).sum() > 1:
                lowest = last.start + int(np.nanargmin(curve.mean[last]))
                place = curve.at["step"][lowest], curve.mean[lowest]
                axes.plot(*place, "o", color=colour, markersize=11, markerfacecolor="none", markeredgewidth=1.5)
        else:
            _draw_curve(axes, curve, colour=colour, label=line.label, raw=chart.raw)
    mark_cuts(axes, () if chart.raw else cuts)
    _draw_levels(axes, chart.levels)
    title = f"{chart.title} [{chart.unit}]" if chart.unit else chart.title
    note = " ".join(filter(None, (chart.note, _RING if any(line.best for line in chart.lines) else "")))
    lines = note_above(axes, note)
    axes.set_title(title, loc="left", fontsize=10, pad=8 + 9 * lines if lines else None)
    axes.set_xlabel("step", fontsize=8.5)
    if chart.log and any(value > 0 for value in axes.dataLim.intervaly):
        log_scale(axes)
    elif chart.zero:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(engineering)
    axes.xaxis.set_major_formatter(engineering)
    dress(axes)
    whole_steps(axes)
    if len(chart.lines) > 1 or chart.levels:
        legend_below(axes)


def _draw_levels(axes: Axes, levels: Sequence[Level]) -> None:
    """Horizontal lines; each label is in the legend once."""
    end = axes.dataLim.x1
    for number, level in enumerate(levels):
        steps = (level.first, max(level.first, end) if level.last is None else level.last)
        label = level.label if level.label not in [one.label for one in levels[:number]] else None
        axes.plot(steps, (level.value, level.value), color=GREY, linewidth=1.2, linestyle=(0, (6, 3)), label=label)


def _draw_curve(axes: Axes, curve: Curve, *, colour: str, label: str, raw: bool) -> None:
    steps = curve.with_gaps(curve.at["step"])
    span = 0 if raw else len(curve.mean) // 100
    if span > 0:
        axes.plot(steps, curve.with_gaps(curve.mean), color=colour, linewidth=0.7, alpha=0.3)
    values = curve.with_gaps(smoothed(curve, span=span))
    axes.plot(steps, values, color=colour, linewidth=1.6, label=label, clip_on=False)  # a line at zero is whole


def _draw_layers(run: Run, out: Path, *, suffix: str) -> list[Path]:
    files = []
    record = run.layers[-1]
    groups = _groups(run)
    if groups:
        files.append(_beside(out, f"experts{suffix}"))
        _draw_experts(record, groups, files[-1], absent=_absent(run))
        if any("coselection" in figures for _, _, figures in _experts(record)):
            files.append(_beside(out, f"coselection{suffix}"))
            _draw_coselection(record, groups, files[-1])
    found = _over_time(run)
    if found:
        files.append(_beside(out, f"layers{suffix}"))
        _draw_over_time(run, found, files[-1])
    return files


def _experts(record: dict[str, Any]) -> list[tuple[int, tuple[str, str], dict[str, Any]]]:
    """Layer, (group, modality) and values of everything that experts did."""
    return [
        (int(layer), (group, modality), figures)
        for layer, entry in record["layers"].items()
        for group, some in entry.get("experts", {}).items()
        for modality, figures in some.items()
    ]


def _groups(run: Run) -> list[tuple[str, str]]:
    found = dict.fromkeys(key for _, key, _ in _experts(run.layers[-1]))
    order = modalities_of([run.history])
    return sorted(found, key=lambda key: order.index(key[1]) if key[1] in order else len(order))


def _absent(run: Run) -> list[str]:
    """Modalities of earlier records of layers that the last one lacks."""
    earlier = dict.fromkeys(modality for record in run.layers for _, (_, modality), _ in _experts(record))
    return [name for name in earlier if name not in {modality for _, modality in _groups(run)}]


def _name(group: tuple[str, str]) -> str:
    return group[0] if group[0] == group[1] else f"{group[0]}, {group[1]} tokens"


def _draw_experts(
    record: dict[str, Any], groups: Sequence[tuple[str, str]], file: Path, *, absent: Sequence[str]
) -> None:
    layers = sorted({layer for layer, _, _ in _experts(record)})
    figure = new_figure(width=1.5 + 3.6 * len(groups), height=min(9.0, 1.6 + 0.3 * len(layers)))
    tables = {group: {n: f["load"] for n, key, f in _experts(record) if key == group} for group in groups}
    top = max(max(load) for table in tables.values() for load in table.values())
    for place, group in enumerate(groups, start=1):
        axes = figure.add_subplot(1, len(groups), place)
        size = max(len(load) for load in tables[group].values())
        rows = [tables[group].get(n, [np.nan] * size) for n in layers]
        image = axes.imshow(rows, vmin=0, vmax=top, cmap="viridis", aspect="auto", interpolation="nearest")
        _label_layers(axes, layers)
        axes.set_title(f"{_name(group)}: tokens taken, step {record['step']:,}", loc="left", fontsize=9)
        axes.set_xlabel("expert", fontsize=8.5)
        axes.set_xticks(range(0, size, max(1, size // 8)))
    if absent:
        said = f"The micro-batches of step {record['step']:,} have no tokens of {' and '.join(absent)}."
        figure.supxlabel(said, fontsize=8, color=GREY)
    figure.colorbar(image, ax=figure.axes, shrink=0.8, label="fraction of the modality's tokens")
    save_figure(figure, file)


def _draw_coselection(record: dict[str, Any], groups: Sequence[tuple[str, str]], file: Path) -> None:
    every = [(layer, group, figures.get("coselection")) for layer, group, figures in _experts(record)]
    # A group with one expert has none.
    found = {group: [(layer, pairs) for layer, key, pairs in every if key == group and pairs] for group in groups}
    found = {group: sorted(some)[:_SHOWN_LAYER_MAPS] for group, some in found.items() if some}
    columns = max(len(some) for some in found.values())
    figure = new_figure(width=min(16.0, 1.4 + 1.35 * columns), height=0.5 + 1.7 * len(found))
    for row, (group, some) in enumerate(found.items()):
        for column, (layer, matrix) in enumerate(some):
            axes = figure.add_subplot(len(found), columns, row * columns + column + 1)
            shown = np.array(matrix, dtype=np.float64)
            np.fill_diagonal(shown, np.nan)
            image = axes.imshow(shown, vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
            axes.set_title(f"{_name(group)}, layer {layer}", fontsize=8)
            ticks = range(0, len(shown), max(1, len(shown) // 4))
            axes.set_xticks(ticks)
            axes.set_yticks(ticks)
            axes.tick_params(labelsize=6.5)
            if column == 0:
                axes.set_ylabel("expert", fontsize=8)
            if row == len(found) - 1:
                axes.set_xlabel("expert", fontsize=8)
    label = f"share of the row's expert's tokens\nthat the column's took too; step {record['step']:,}"
    figure.colorbar(image, ax=figure.axes, shrink=0.8).set_label(label, fontsize=8)
    save_figure(figure, file)


def _layers_of(run: Run) -> list[int]:
    return sorted({int(layer) for record in run.layers for layer in record["layers"]})


def _over_time(run: Run) -> dict[str, dict[str, Floats]]:
    """[layers, records] by kind of value and by modality: tokens that no expert took, depth selection, output norm."""
    layers = _layers_of(run)
    found: dict[str, dict[str, Floats]] = {}
    for place, record in enumerate(run.layers):
        for layer, entry in record["layers"].items():
            for title, name, value in _figures(entry):
                maps = found.setdefault(title, {})
                table = maps.setdefault(name, np.full((len(layers), len(run.layers)), np.nan))
                table[layers.index(int(layer)), place] = value if isinstance(value, int | float) else np.nan
    return found


def _draw_over_time(run: Run, found: Mapping[str, Mapping[str, Floats]], file: Path) -> None:
    """Layer against step; a row for each kind of value, a column for each modality."""
    layers = _layers_of(run)
    columns = max(len(maps) for maps in found.values())
    height = min(14.0, (1.1 + 0.16 * len(layers)) * len(found))
    figure = new_figure(width=1.5 + 4.2 * columns, height=max(2.0, height))
    order = modalities_of([run.history])
    for row, (title, named) in enumerate(found.items()):
        maps = dict(sorted(named.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))
        known = np.concatenate([table[np.isfinite(table)] for table in maps.values()])
        low, high = (known.min(), known.max()) if len(known) else (0.0, 1.0)
        own = []
        for column, (name, table) in enumerate(maps.items()):
            axes = figure.add_subplot(len(found), columns, row * columns + column + 1)
            image = axes.imshow(table, vmin=low, vmax=high, cmap="viridis", aspect="auto", interpolation="nearest")
            axes.set_title(f"{title}: {name}", loc="left", fontsize=9)
            _label_layers(axes, layers)
            ticks = np.unique(np.linspace(0, len(run.layers) - 1, min(6, len(run.layers))).round().astype(int))
            axes.set_xticks(ticks, [engineering(run.layers[i]["step"], 0) for i in ticks])
            axes.set_xlabel("step", fontsize=8.5)
            axes.tick_params(labelsize=7.5)
            own.append(axes)
        figure.colorbar(image, ax=own, shrink=0.9).set_label(_SCALES[title], fontsize=8)
    save_figure(figure, file)


def _figures(entry: dict[str, Any]) -> list[tuple[str, str, Any]]:
    found = [
        ("no expert took", _name((group, modality)), figures["unrouted"])
        for group, some in entry.get("experts", {}).items()
        for modality, figures in some.items()
    ]
    found += [("depth, processed", name, value) for name, value in entry.get("depth", {}).items()]
    return found + [("output norm", name, value) for name, value in entry.get("output_norm", {}).items()]


def _label_layers(axes: Axes, layers: Sequence[int]) -> None:
    places = range(0, len(layers), max(1, len(layers) // 8))
    axes.set_yticks(list(places), [str(layers[place]) for place in places])
    axes.set_ylabel("layer", fontsize=8.5)
    axes.tick_params(labelsize=7.5)


def _draw_timelines(runs: Sequence[Run], file: Path) -> None:
    from matplotlib.patches import Patch

    figure = new_figure(width=10.0, height=1.2 + 0.75 * len(runs))
    axes = figure.add_subplot()
    factor, unit = clock_unit(max((span.end for run in runs for span in run.timeline.spans), default=0.0))
    marks: dict[str, Line2D] = {}
    for row, run in enumerate(runs):
        for span in run.timeline.spans:
            width = (span.end - span.begin) * factor
            axes.barh(row, width, left=span.begin * factor, height=0.5, color=_SPANS[span.kind])
        drawn = run.timeline.drawn()
        for mark, some in {
            _UNUSUAL: [one for one in drawn if not one.routine],
            _STOPPED: [one for one in drawn if one.event == "stop"],
            _SAVED: [one for one in drawn if one.event == "save_committed"],
        }.items():
            if some:
                symbol, size, colour, word = mark
                places = [one.hours * factor for one in some]
                (line,) = axes.plot(
                    places, [row + 0.38] * len(some), symbol, color=colour, markersize=size, clip_on=False
                )
                marks[word or crosses(one for run in runs for one in run.timeline.events)] = line
    shares = [f", goodput {run.timeline.goodput:.1%}" if run.timeline.goodput is not None else "" for run in runs]
    axes.set_yticks(range(len(runs)), [f"{run.name}{share}" for run, share in zip(runs, shares, strict=True)])
    axes.set_ylim(len(runs) - 0.4, -0.5)
    axes.set_xlabel(f"{unit} since the first event", fontsize=8.5)
    kinds = dict.fromkeys(span.kind for run in runs for span in run.timeline.spans)
    # Evaluations and saves are not spans of their own here.
    names = TIME_PARTS | {"steps": f"{TIME_PARTS['steps']}, with their evaluations and saves"}
    handles: list[Artist] = [Patch(color=_SPANS[kind], label=names[kind]) for kind in kinds]
    for word, line in marks.items():
        line.set_label(word)
        handles.append(line)
    axes.legend(handles=handles, frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    save_figure(figure, file)
