"""Draws loss curves of several runs, and rows of small images, as PNG files.

Needs no display. Of a run it reads only metrics.jsonl. pictures.py makes a report's PNGs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmscale.errors import UsageError
from mmscale.report.breaks import Cut, cuts_of, steps_of
from mmscale.report.charts import modalities_of
from mmscale.report.downsample import Curve, Downsampler
from mmscale.report.figure_style import (
    COLOURS,
    GREY,
    MARKS,
    dress,
    engineering,
    legend_below,
    log_scale,
    mark_cuts,
    new_figure,
    save_figure,
    whole_steps,
)
from mmscale.report.held_out_parts import HeldOutParts
from mmscale.report.history import History, read
from mmscale.runs.events import read_events
from mmscale.runs.held_out import EVAL, HeldOut
from mmscale.runs.metrics import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLES = ("-", "--", ":", "-.")
_LOSS = "loss/"
_STEP = "step"
_SMOOTH_ABOVE = 200  # points of a curve; if there are more they are drawn faintly behind their running mean
_DOTS_BELOW = 40
# Points of a curve; with more logged steps a point is a mean, with a band from the lowest to the highest.
_POINTS = 2000


def loss_curves(runs: Sequence[Path], out: Path) -> None:
    """Training and held-out loss per modality, gradient norm, learning rate and throughput of runs.

    A colour is a modality, or a run in charts without modalities; a line style is a run.

    Args:
        runs: Run folders.
        out: PNG file.

    Raises:
        UsageError: A run has no metrics.
    """
    found = {name: _read(run, name if len(runs) > 1 else "") for name, run in zip(run_names(runs), runs, strict=True)}
    figure = new_figure(width=10.0, height=7.2)
    grid = figure.add_gridspec(2, 3, height_ratios=(2.2, 1.0))
    losses = figure.add_subplot(grid[0, :])
    _draw_losses(losses, found)
    panels = (
        ("grad_norm", "gradient norm", "log"),
        ("lr", "learning rate", "linear"),
        ("tokens_per_second", "tokens per second", "linear"),
    )
    for column, (key, title, scale) in enumerate(panels):
        _draw_panel(figure.add_subplot(grid[1, column], sharex=losses), found, key, title=title, scale=scale)
    save_figure(figure, out)


def sample_rows(rows: Sequence[tuple[str, Sequence[NDArray[Any]]]], out: Path) -> None:
    """Labelled rows of small images, e.g. sampled digits.

    Args:
        rows: Label and images of each row; an image is [height, width] or [height, width, 3], uint8 or 0..1.
        out: PNG file.
    """
    columns = max((len(images) for _, images in rows), default=1) or 1
    cell = 0.62  # inches
    label = 0.30 + 0.085 * max((len(text) for text, _ in rows), default=0)
    width, height = label + cell * columns + 0.1, cell * max(len(rows), 1) + 0.1
    figure = new_figure(width=width, height=height)
    figure.set_layout_engine("none")
    for row, (text, images) in enumerate(rows):
        top = 1 - (0.05 + cell * (row + 1)) / height
        figure.text((label - 0.12) / width, top + cell / height / 2, text, ha="right", va="center", fontsize=10)
        for column, image in enumerate(images):
            gap = 0.04
            left = (label + cell * column + gap / 2) / width
            axes = figure.add_axes((left, top + gap / 2 / height, (cell - gap) / width, (cell - gap) / height))
            _draw_image(axes, np.asarray(image))
    save_figure(figure, out)


def run_names(runs: Sequence[Path]) -> list[str]:
    """A short name for each run; its path if two folders have the same name, and a number if two paths are the same."""
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    return [f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


@dataclass(frozen=True)
class _Run:
    history: History
    cuts: list[Cut]
    parts: HeldOutParts


def _read(run: Path, name: str) -> _Run:
    """A run's data; the name is for labels, "" if it is the only run."""
    history, events = _history(run), read_events(run)
    return _Run(history, cuts_of(run, events, name=name), HeldOutParts.of_run(run, events))


def _history(run: Path) -> History:
    history = read(run)
    if not len(history):
        raise UsageError(
            f"report: {run} has no {METRICS} with a logged step", remedy="name a folder that `mmscale train` wrote"
        )
    return history


def _draw_losses(axes: Axes, runs: Mapping[str, _Run]) -> None:
    modalities = [f"{_LOSS}{name}" for name in modalities_of([run.history for run in runs.values()])]
    whole = len(runs) > 1 and any(run.parts.partial(run.history) for run in runs.values())
    for number, (name_of_run, run) in enumerate(runs.items()):
        prefix = f"{name_of_run}: " if len(runs) > 1 else ""
        for place, key in enumerate(modalities or ["loss"]):
            name = key.removeprefix(_LOSS) if modalities else "loss"
            colour = COLOURS[place % len(COLOURS)]
            curve, held = _curve(run, key), _curve(run, f"{EVAL}{key}")
            if curve is not None:
                _draw_line(axes, curve, colour=colour, style=_STYLES[number % len(_STYLES)], label=f"{prefix}{name}")
            if held is not None:
                part = run.parts.words_over_time(run.history, f"{EVAL}{key}", whole=whole)
                where = HeldOut(key).where(routed=run.history.routes)
                axes.plot(
                    held.at[_STEP],
                    held.mean,
                    linestyle="none",
                    color=colour,
                    label=f"{prefix}{name}, {where}{part}",
                    zorder=3,
                    marker=MARKS[number % len(MARKS)],
                    markersize=6.5,
                    markerfacecolor=(colour, 0.45),  # transparent, so that marks at the same place are all visible
                    markeredgecolor=colour,
                    markeredgewidth=1.0,
                )
    drawn = ("loss", f"{EVAL}loss")
    cuts = [cut for run in runs.values() for cut in run.cuts if any(cut.breaks(key) for key in drawn)]
    mark_cuts(axes, [(cut.step, cut.text) for cut in cuts])
    axes.set_title("Loss per token" if not modalities else "Loss per token of each modality", loc="left", fontsize=11)
    axes.set_ylabel("cross-entropy [nats]")
    axes.set_xlabel("step")
    dress(axes)
    whole_steps(axes)
    if axes.get_legend_handles_labels()[0]:
        legend_below(axes)


def _draw_panel(axes: Axes, runs: Mapping[str, _Run], key: str, *, title: str, scale: str) -> None:
    measured = False
    for number, (name, run) in enumerate(runs.items()):
        curve = _curve(run, key)
        if curve is not None:
            measured = True
            style = _STYLES[number % len(_STYLES)]
            colour = GREY if len(runs) == 1 else COLOURS[number % len(COLOURS)]
            _draw_line(axes, curve, colour=colour, style=style, label=name)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("step")
    if not measured:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color=GREY)
        axes.set_yticks([])
    elif scale == "log":
        log_scale(axes)
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(engineering)
    dress(axes)
    whole_steps(axes)


def _curve(run: _Run, key: str) -> Curve | None:
    sampler = Downsampler({_STEP: run.history.steps}, points=_POINTS)
    return sampler.curve(run.history.of(key), breaks=steps_of(run.cuts, key))


def _draw_line(axes: Axes, curve: Curve, *, colour: str, style: str, label: str) -> None:
    steps, number = curve.with_gaps(curve.at[_STEP]), len(curve.mean)
    marker = "." if number < _DOTS_BELOW else "none"
    if not curve.exact:
        low, high = curve.with_gaps(curve.low), curve.with_gaps(curve.high)
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    if number > _SMOOTH_ABOVE:
        axes.plot(steps, curve.with_gaps(curve.mean), color=colour, linewidth=0.8, alpha=0.25)
    values = curve.with_gaps(smoothed(curve, span=number // _SMOOTH_ABOVE * 2 if number > _SMOOTH_ABOVE else 0))
    axes.plot(steps, values, color=colour, linestyle=style, linewidth=1.6, label=label, marker=marker, markersize=4)


def running_mean(values: NDArray[np.float64], *, span: int) -> NDArray[np.float64]:
    """Mean over `span` neighbours on each side, [n] -> [n], so that the curve does not lag behind; NaN is skipped."""
    known = np.isfinite(values)
    sums = np.concatenate(([0.0], np.cumsum(np.where(known, values, 0.0))))
    counts = np.concatenate(([0], np.cumsum(known)))
    places = np.arange(len(values))
    # At the start, where curves are steep, the window shrinks to stay centred. At the end it is cut off instead,
    # because otherwise the curve would end in a single noisy value.
    reach = np.minimum(places, span)
    first, end = places - reach, np.minimum(places + reach + 1, len(values))
    number = counts[end] - counts[first]
    return np.where(number > 0, (sums[end] - sums[first]) / np.maximum(number, 1), np.nan)


def smoothed(curve: Curve, *, span: int) -> NDArray[np.float64]:
    """[P] running means of a curve, none of them across a gap; the curve itself if the span is 0."""
    if span == 0:
        return curve.mean
    return np.concatenate([running_mean(curve.mean[piece], span=span) for piece in curve.pieces()])


def _draw_image(axes: Axes, image: NDArray[Any]) -> None:
    if image.ndim == 3 and image.shape[-1] == 1:
        image = image[..., 0]
    top = 255 if np.issubdtype(image.dtype, np.integer) else 1.0
    if image.ndim == 2:
        axes.imshow(image, cmap="gray", vmin=0, vmax=top, interpolation="nearest", aspect="equal")
    else:
        axes.imshow(image, interpolation="nearest", aspect="equal")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#9a9a9a")
        spine.set_linewidth(0.6)
