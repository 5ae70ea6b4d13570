"""The work needed to reach a loss: fits a falling curve to noisy points, and computes ratios at equal loss.

eta (MoMa, arXiv 2407.21770, section 4): the baseline's work at a loss over the other model's. Monotone regression, then
monotone interpolation of log(work) by loss, so that each loss is reached once. It works on arrays, independent of runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import PchipInterpolator
from scipy.optimize import isotonic_regression

# Number of bins of equal width in log(work) in which training losses of single steps are averaged before the
# regression.
SMOOTH_BINS = 64
_FEWEST = 3  # smallest number of points of a curve


class Bound(StrEnum):
    """Kinds of results for a ratio."""

    NONE = ""  # the ratio itself
    AT_LEAST = ">="  # the baseline was never as low as this loss
    AT_MOST = "<="  # the other model was never as low as this loss


@dataclass(frozen=True)
class Ratio:
    """The baseline's work over the other's at one loss.

    Attributes:
        value: the ratio, or its bound.
        bound: which of the two.
        low, high: smallest and largest over pairs of seeds; None if a pair has only a bound on that side, and with one
            pair.
        pairs: number of pairs of seeds that give a ratio or a bound.
    """

    value: float
    bound: Bound = Bound.NONE
    low: float | None = None
    high: float | None = None
    pairs: int = 1

    def __str__(self) -> str:
        ends = ("" if self.low is None else f"{self.low:.2f}", "" if self.high is None else f"{self.high:.2f}")
        words = {
            (True, True): "{} to {}",
            (True, False): "{} or more",
            (False, True): "{1} or less",
            (False, False): "open",
        }[bool(ends[0]), bool(ends[1])].format(*ends)
        spread = f" ({words})" if self.pairs > 1 else ""
        return f"{self.bound}{' ' if self.bound else ''}{self.value:.2f}{spread}"


class Falling:
    """A loss that never rises with work, up to the lowest measured point.

    Points after the lowest one (over-fitting, or noise) are not used: they do not show how much work a lower loss
    needs, and averaged into the last level they would make a reached loss appear unreached. The disadvantage is that
    the curve ends at the lowest of noisy points, which is below the true loss by about the noise of a point, for both
    models alike. Only the points before are smoothed by the regression. Losses of single training steps are averaged in
    bins first; single evaluations are used unchanged, so a level that only the lowest of them reaches depends on that
    one.

    Args:
        work: FLOPs, seconds or steps of each point, above 0; any order, repeated ones (several seeds) are averaged.
        loss: loss of each point; points that are not finite are ignored.
        bins: number of bins of equal width in log(work) in which points are averaged first; None: no averaging.

    Raises:
        ValueError: fewer than three points are left.

    Attributes:
        total: work of the last point, whatever its loss.
        best, first: lowest and highest loss of the curve; `best` is that of the lowest point (or bin).
        start, end: work at which the curve has them.
    """

    def __init__(self, work: ArrayLike, loss: ArrayLike, *, bins: int | None = None) -> None:
        x, y = np.asarray(work, float), np.asarray(loss, float)
        known = np.isfinite(x) & np.isfinite(y) & (x > 0)
        x, y = np.log(x[known]), y[known]
        if len(np.unique(x)) < _FEWEST:
            raise ValueError(f"{len(np.unique(x))} points with work and loss, fewer than {_FEWEST}")
        self.total = float(np.exp(x.max()))
        x, y, weight = _averaged(x, y, bins)
        x, y, weight = (values[: int(np.argmin(y)) + 1] for values in (x, y, weight))
        fitted = isotonic_regression(y, weights=weight, increasing=False)
        # Each block of the regression (a stretch with constant loss) becomes one point in its middle.
        starts, ends = fitted.blocks[:-1], fitted.blocks[1:]
        self._level = np.array([fitted.x[start] for start in starts])
        self._place = np.array(
            [np.average(x[a:b], weights=weight[a:b]) for a, b in zip(starts, ends, strict=True)], dtype=float
        )
        self.first, self.best = float(self._level[0]), float(self._level[-1])
        self.start, self.end = float(np.exp(self._place[0])), float(np.exp(self._place[-1]))

    def work_at(self, loss: float) -> float | None:
        """Work at which the loss is reached; None: it never is, or it was reached before the first point."""
        if not self.best <= loss <= self.first:
            return None
        if loss == self.best:
            return self.end
        return float(np.exp(PchipInterpolator(self._level[::-1], self._place[::-1])(loss)))

    def loss_at(self, work: float) -> float:
        """Loss after an amount of work; outside of the curve, that of its nearest end."""
        place = math.log(work)
        if place >= self._place[-1]:
            return self.best
        if place <= self._place[0]:
            return self.first
        return float(PchipInterpolator(self._place, self._level)(place))


def ratio_at(baseline: Sequence[Falling], other: Sequence[Falling], loss: float) -> Ratio | None:
    """Work of the baseline over the other's at a loss.

    The ratio is computed from the first curve of each side (with several seeds, that of all their points together); the
    others are single seeds and give the spread.

    Returns:
        None: neither reached the loss, or one was below it at its first point.
    """
    ratio = _ratio(baseline[0], other[0], loss)
    if ratio is None or ratio.bound is not Bound.NONE:
        return ratio
    pairs = [_ratio(mine, theirs, loss) for mine in baseline[1:] or baseline for theirs in other[1:] or other]
    known = [pair for pair in pairs if pair is not None]
    if len(known) < 2:
        return ratio
    bounds = {pair.bound for pair in known}
    return Ratio(
        ratio.value,
        low=None if Bound.AT_MOST in bounds else min(pair.value for pair in known),
        high=None if Bound.AT_LEAST in bounds else max(pair.value for pair in known),
        pairs=len(known),
    )


def matched(baseline: Falling, other: Falling, *, points: int = 100) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Step matching (MoT, arXiv 2411.04996): the other's work at the loss of the baseline at each point of its work.

    Returns:
        Work of the baseline and of the other, if both are known; below the diagonal the other is faster.
    """
    places = np.linspace(baseline.start, baseline.end, points)
    found = [(mine, other.work_at(baseline.loss_at(mine))) for mine in places]
    known = [(mine, theirs) for mine, theirs in found if theirs is not None]
    pairs = np.array(known, dtype=float).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _ratio(baseline: Falling, other: Falling, loss: float) -> Ratio | None:
    mine, theirs = baseline.work_at(loss), other.work_at(loss)
    if mine is not None and theirs is not None:
        return Ratio(mine / theirs)
    if mine is None and theirs is not None and loss < baseline.best:
        return Ratio(baseline.total / theirs, Bound.AT_LEAST)
    if theirs is None and mine is not None and loss < other.best:
        return Ratio(mine / other.total, Bound.AT_MOST)
    return None


def _averaged(
    x: NDArray[np.float64], y: NDArray[np.float64], bins: int | None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Means of the points at the same place, or in the same bin, in order; and the number of points of each."""
    if bins is None:
        _, group = np.unique(x, return_inverse=True)
    else:
        edges = np.linspace(x.min(), x.max(), bins + 1)
        _, group = np.unique(np.digitize(x, edges[1:-1]), return_inverse=True)
    count = np.bincount(group).astype(float)
    return np.bincount(group, x) / count, np.bincount(group, y) / count, count
