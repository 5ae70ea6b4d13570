"""One-cycle learning rate (arXiv 1708.07120): up to the peak, then down, in two half cosines."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmscale.extend import Point


@dataclass(frozen=True, kw_only=True)
class OneCycle:
    """The schedule.

    Attributes:
        peak_at: share of the steps after which the learning rate is at its peak.
    """

    peak_at: float = 0.3

    def __call__(self, at: Point) -> float:
        """Learning rate of a step."""
        done = at.step / (at.steps + 1)
        rising = done < self.peak_at
        share = done / self.peak_at if rising else (1.0 - done) / (1.0 - self.peak_at)
        height = 0.5 * (1.0 - math.cos(math.pi * share))
        return at.optim.min_lr + (at.optim.lr - at.optim.min_lr) * height
