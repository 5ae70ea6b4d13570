"""Downsamples curves of any length to a bounded number of points, keeping every extreme.

Each bin keeps its mean, lowest and highest value. Independent of keys and of drawing.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mmscale.report.history import Floats

POINTS = 700  # points of a curve; about the width of a chart on a laptop in pixels


@dataclass(frozen=True)
class Curve:
    """A curve in at most `points` bins of neighbouring measurements.

    Attributes:
        at: [P] by axis, the place of each bin (its mean).
        mean, low, high: [P] of the finite values of a bin; NaN if it has none. For identifiers (`Downsampler.curve`)
            all three are the most frequent one.
        broken: bins with a value that was not finite.
        gaps: bins that begin after a break and are not joined with the one before.
    """

    at: dict[str, Floats]
    mean: Floats
    low: Floats
    high: Floats
    broken: NDArray[np.int64]
    gaps: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def pieces(self) -> list[slice]:
        """Places of the points between gaps, in order."""
        edges = [0, *self.gaps.tolist(), len(self.mean)]
        return [slice(first, end) for first, end in itertools.pairwise(edges) if end > first]

    def with_gaps(self, values: Floats) -> Floats:
        """[P] values of a curve or its axis, with NaN before each gap, which interrupts a line through them."""
        return np.insert(values.astype(np.float64), self.gaps, np.nan)

    @property
    def exact(self) -> bool:
        """Whether every measurement is a separate point."""
        return bool(np.array_equal(self.low, self.high, equal_nan=True))


class Downsampler:
    """Downsamples the columns of one run. Columns measured at the same rows share their axes.

    Args:
        axes: [R] by name.
        points: bins of a curve at most.
    """

    def __init__(self, axes: Mapping[str, Floats], *, points: int = POINTS) -> None:
        self.axes = axes
        self.points = points
        self._shared: dict[tuple[bytes, tuple[int, ...]], dict[str, Floats]] = {}

    def curve(self, column: Floats, *, names: bool = False, breaks: tuple[int, ...] = ()) -> Curve | None:
        """The curve of a column; None if it was never measured.

        Args:
            column: [R], NaN if nothing was measured, infinite if the value was not finite.
            names: values are identifiers, e.g. of ranks, and have no mean.
            breaks: steps after which the curve is interrupted; the axes must include "step" then.
        """
        measured = ~np.isnan(column)
        rows = np.flatnonzero(measured)
        if not len(rows):
            return None
        edges = np.linspace(0, len(rows), min(self.points, len(rows)) + 1).astype(np.int64)[:-1]
        starts = np.searchsorted(self.axes["step"][rows], breaks, side="right") if breaks else np.zeros(0, np.int64)
        starts = np.unique(starts[(starts > 0) & (starts < len(rows))])
        edges = np.unique(np.concatenate((edges, starts)))
        key = np.packbits(measured).tobytes(), breaks
        if key not in self._shared:
            self._shared[key] = {name: _mean(values[rows], edges) for name, values in self.axes.items()}
        values = column[rows]
        broken = ~np.isfinite(values)
        values = np.where(broken, np.nan, values)
        if names:
            mean = low = high = _most_frequent(values, edges)
        else:
            mean, low, high = _mean(values, edges), np.fmin.reduceat(values, edges), np.fmax.reduceat(values, edges)
        broken_bins = np.flatnonzero(np.logical_or.reduceat(broken, edges))
        return Curve(self._shared[key], mean, low, high, broken_bins, np.searchsorted(edges, starts))


def _most_frequent(values: Floats, edges: NDArray[np.int64]) -> Floats:
    """The most frequent value of each bin; of equally frequent ones the lowest."""
    found = np.full(len(edges), np.nan)
    for place, some in enumerate(np.split(values, edges[1:])):
        distinct, counts = np.unique(some[np.isfinite(some)], return_counts=True)
        if len(distinct):
            found[place] = distinct[np.argmax(counts)]
    return found


def _mean(values: Floats, edges: NDArray[np.int64]) -> Floats:
    known = np.isfinite(values)
    sums = np.add.reduceat(np.where(known, values, 0.0), edges)
    counts = np.add.reduceat(known, edges, dtype=np.int64)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
