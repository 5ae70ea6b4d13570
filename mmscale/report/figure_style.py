"""The style of all figures: colours, axes, labels, and deterministic files."""

from __future__ import annotations

from collections.abc import Iterable
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
    """Vertical lines at breaks, with the text of each change on the side where it has room.

    A text that would touch another one is in a row below it. The panel gets its size only when the figure is written,
    so the lengths of texts are estimates, which are rather too long.

    Args:
        axes: the panel, in which all curves are drawn.
        cuts: place and text of each.
    """
    first, last = axes.dataLim.intervalx
    per_letter = (last - first) * _LETTER / _panel_width(axes)
    rows: list[float] = []  # where the last text of each row ends
    placed = []
    for place, text in sorted(set(cuts)):
        left, width = place - first > 0.6 * (last - first), per_letter * len(text)
        placed.append((place - width if left else place, place, text, left, width))
    for begin, place, text, left, width in sorted(placed):
        row = next((number for number, end in enumerate(rows) if end < begin), len(rows))
        rows[row : row + 1] = [begin + width]
        axes.axvline(place, color=GREY, linewidth=1.0, linestyle=(0, (6, 2)), zorder=1)
        axes.annotate(
            text,
            (place, 1.0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(-3 if left else 3, -3 - _ROW * row),
            textcoords="offset points",
            ha="right" if left else "left",
            va="top",
            fontsize=7.5,
            color=GREY,
        )


def _panel_width(axes: Axes) -> float:
    """About how wide a panel will be [points]."""
    spec = axes.get_subplotspec()
    share = 1.0 if spec is None else len(spec.colspan) / spec.get_gridspec().ncols
    figure = axes.get_figure(root=True)
    assert figure is not None  # a panel is in one
    return float(figure.get_size_inches()[0]) * 72.0 * share * 0.8


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
