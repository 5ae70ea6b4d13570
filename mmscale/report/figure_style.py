"""The style of all figures: colours, axes, labels, and deterministic files."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours without yellow and black, which can be distinguished with any colour vision and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKS = ("o", "D", "^", "s")  # in the order of assets/chart.js
GREY = "#5a5a5a"
_LETTER, _ROW = 4.3, 9.0  # width of a letter, and height of a row, of the labels of breaks [points]
_NOTE_LETTER = 3.7  # width of a letter of notes [points]
_SWATCH = 36.0  # width of an entry of a legend without its text [points]
_LEGEND_ROW, _BELOW = 11.5, 30.0  # height of a row of a legend, and its distance from the panel [points]
_SHORTEST = 12  # letters of a line
_CLOCK = ((0.03, 3600.0, "seconds"), (2.0, 60.0, "minutes"), (96.0, 1.0, "hours"), (float("inf"), 1 / 24, "days"))


def new_figure(*, width: float, height: float) -> Figure:
    """An empty figure [inches]."""
    # Without pyplot, which has global state and looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def mark_cuts(axes: Axes, cuts: Iterable[tuple[float, str]]) -> None:
    """Vertical lines at breaks, with the text of each change on the side where it has room, in lines that fit there.

    Of two breaks with the same text at neighbouring steps, of held-out and of training curves, the later one is marked.
    A text that would touch another one is below it. The panel gets its size only when the figure is written, so the
    lengths of texts are estimates, which are rather too long.

    Args:
        axes: the panel, in which all curves are drawn.
        cuts: place and text of each.
    """
    found = sorted(set(cuts))
    found = [(place, text) for place, text in found if (place + 1, text) not in found]
    places = [place for place, _ in found]
    first, last = min(axes.dataLim.x0, *places, math.inf), max(axes.dataLim.x1, *places, -math.inf)
    per_letter = (last - first) * _LETTER / panel_width(axes)
    rows: list[float] = []  # where the last text of each row ends
    placed = []
    for place, text in found:
        left = place - first > 0.6 * (last - first)
        room = place - first if left else last - place
        lines = textwrap.wrap(text, max(_SHORTEST, int(room / per_letter)))
        width = per_letter * max(map(len, lines), default=0)
        placed.append((place - width if left else place, place, lines, left, width))
    for begin, place, lines, left, width in sorted(placed):
        row = next((n for n in range(len(rows)) if all(end < begin for end in rows[n : n + len(lines)])), len(rows))
        rows[row : row + len(lines)] = [begin + width] * len(lines)
        axes.axvline(place, color=GREY, linewidth=1.0, linestyle=(0, (6, 2)), zorder=1)
        axes.annotate(
            "\n".join(lines),
            (place, 1.0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(-3 if left else 3, -3 - _ROW * row),
            textcoords="offset points",
            ha="right" if left else "left",
            va="top",
            fontsize=7.5,
            linespacing=1.0,
            color=GREY,
        ).set_in_layout(False)  # it is inside the panel, which would be made narrower for it


def legend_below(axes: Axes) -> None:
    """A legend under the label of the x axis, in as many columns as there is room for."""
    from matplotlib.transforms import ScaledTranslation

    handles, labels = axes.get_legend_handles_labels()
    width = panel_width(axes)
    wrapped = _entries(labels, width)
    figure = axes.get_figure(root=True)
    assert figure is not None
    below = axes.transAxes + ScaledTranslation(0, -_BELOW / 72, figure.dpi_scale_trans)
    axes.legend(
        handles,
        wrapped,
        frameon=False,
        fontsize=7.5,
        ncols=_legend_columns(wrapped, width),
        loc="upper left",
        bbox_to_anchor=(0, 0),
        bbox_transform=below,
        borderaxespad=0.0,
        borderpad=0.0,
    )


def legend_height(labels: Sequence[str], width: float) -> float:
    """About how high such a legend will be [inches].

    Args:
        labels: of its entries.
        width: of the panel, as `panel_width`.
    """
    entries = _entries(labels, width)
    columns = _legend_columns(entries, width)
    lines = max((one.count("\n") + 1 for one in entries), default=1)
    return -(-len(entries) // columns) * lines * _LEGEND_ROW / 72


def _entries(labels: Sequence[str], width: float) -> list[str]:
    return [textwrap.fill(label, max(_SHORTEST, int((width - _SWATCH) / _LETTER))) for label in labels]


def _legend_columns(entries: Sequence[str], width: float) -> int:
    longest = max((len(line) for one in entries for line in one.splitlines()), default=1)
    return max(1, min(len(entries), int(width / (_SWATCH + _LETTER * longest))))


def panel_width(axes: Axes) -> float:
    """About how wide a panel will be [points]."""
    spec = axes.get_subplotspec()
    share = 1.0 if spec is None else len(spec.colspan) / spec.get_gridspec().ncols
    figure = axes.get_figure(root=True)
    assert figure is not None  # a panel is in one
    return width_of_share(float(figure.get_size_inches()[0]), share)


def width_of_share(width: float, share: float) -> float:
    """About how wide a panel will be [points] that has a share of the width of a figure [inches]."""
    return width * 72.0 * share * 0.8


def note_above(axes: Axes, note: str) -> int:
    """Write a small text between the title and the panel; returns its number of lines."""
    lines = textwrap.wrap(note, int(panel_width(axes) / _NOTE_LETTER))
    axes.annotate(
        "\n".join(lines),
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 5),
        textcoords="offset points",
        fontsize=7,
        color=GREY,
        annotation_clip=False,
    ).set_in_layout(False)  # the title has a distance for it
    return len(lines)


def save_figure(figure: Figure, out: Path | BinaryIO) -> None:
    """Write a figure as PNG; folders are made."""
    if isinstance(out, Path):
        out.parent.mkdir(parents=True, exist_ok=True)
    # Without software version and date, so that the same run gives the same file.
    figure.savefig(out, format="png", facecolor="white", metadata={"Software": None})


def dress(axes: Axes) -> None:
    """Apply the style to axes."""
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#9a9a9a")
    axes.tick_params(labelsize=8.5, color="#9a9a9a")


def whole_steps(axes: Axes) -> None:
    """Ticks of the x axis at round whole steps only: every 1, 2, 5, 10, 20 ..."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def clock_unit(hours: float) -> tuple[float, str]:
    """Factor and name of the unit that fits a time: 0.03 h are (60, "minutes"). As `clockUnit` in assets/base.js."""
    return next((factor, name) for limit, factor, name in _CLOCK if hours < limit)


def log_scale(axes: Axes) -> None:
    """A logarithmic y axis with labels at 1, 2 and 5, or at every digit if it spans less than a decade."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    subs = (1.0, 2.0, 5.0) if high >= 10 * low else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(engineering)
    axes.yaxis.set_minor_formatter(NullFormatter())


def engineering(value: float, _position: float = 0.0) -> str:
    """Tick labels: 12k, 3M, 1e-4, 2.5e-3."""
    if value == 0:
        return "0"
    if abs(value) < 0.01:
        digits, _, exponent = f"{value:.1e}".partition("e-")
        return f"{float(digits):g}e-{int(exponent)}"
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{suffix}"
    return f"{value:g}"
