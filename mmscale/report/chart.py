"""The description of a chart of a report and of its lines: plain data, which page.py and pictures.py draw."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmscale.runs.held_out import HeldOut
from mmscale.tables.routings import CAUSAL_ROUTINGS

# What the shapes of marks stand for, in their order; there are four, and training never measures top1.
_FIRST = ("batch", "causal", "threshold", "stage")
SHAPES = 4  # different marks
_SHAPES = (*_FIRST, *(one for one in CAUSAL_ROUTINGS if one not in _FIRST))


@dataclass(frozen=True)
class Line:
    """A curve of a chart.

    Attributes:
        run: number of the run.
        key: column.
        label: in the legend.
        colour: number of its colour.
        points: marks at each measurement instead of a line.
        joined: whether marks are joined; sums over different spans are not.
        mark: number of the marks' shape.
        best: mark the lowest value.
        names: values are identifiers, e.g. numbers of ranks: a bin shows the most frequent one, not the mean.
    """

    run: int
    key: str
    label: str
    colour: int
    points: bool = False
    joined: bool = True
    mark: int = 0
    best: bool = False
    names: bool = False


@dataclass(frozen=True)
class Level:
    """A horizontal line of a chart: a value that curves are compared with.

    Attributes:
        run: number of the run.
        value: its height.
        label: in the legend.
        first: the step from which it holds.
        last: the step until which it holds; None: the end of the chart.
    """

    run: int
    value: float
    label: str
    first: int = 0
    last: int | None = None


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        name: for file names and links.
        section: its heading.
        title, unit, note: what it shows.
        log: logarithmic scale at first.
        zero: the scale begins at zero.
        wide: as wide as the page.
        raw: never smoothed, for schedules.
        lines: its curves; empty if no run measured it.
        levels: its horizontal lines.
    """

    name: str
    section: str
    title: str
    unit: str = ""
    note: str = ""
    log: bool = False
    zero: bool = False
    wide: bool = False
    raw: bool = False
    lines: tuple[Line, ...] = field(default=())
    levels: tuple[Level, ...] = field(default=())


def mark_of(measured: HeldOut) -> int:
    """Number of the shape for the routing mode of a held-out value, and for the routers of a later stage."""
    return _SHAPES.index("stage" if measured.stage else measured.routing)
