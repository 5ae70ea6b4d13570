"""What is done about a loss or a gradient that does not look right: a pure policy on plain numbers.

It knows no model, no checkpoint and no process group: train/guard.py asks it before the optimizer applies a step and
does what it says. Every rank asks it with the same numbers and keeps the same history, so nobody needs to be told.

Spikes are found by a robust z-score, (x - median) / (1.4826 MAD) over the last applied steps: median and MAD stay where
they are when a tenth of the window are spikes themselves, mean and standard deviation do not. What follows a spike is,
if one asks for it, PaLM's rule: back to a checkpoint, past the data around the spike (arXiv 2204.02311, section 5.1).
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from mmscale.config import AnomalyConfig

_MAD_OF_NORMAL = 0.6744897501960817  # MAD / standard deviation of a normal distribution
# A spread below this share of the median is rounding, not noise: a constant series would call its first change a spike.
_SMALLEST_SPREAD = 0.01
# Judged by their logarithm: gradient norms are positive and nearly log-normal, and at a spread of 30 % six standard
# deviations of the norm itself would call a healthy step in 3,000 a spike.
_SKEWED = ("grad_norm",)


class Action(Enum):
    """What is to be done with a step whose gradients are ready."""

    APPLY = "apply"
    REPLAY = "replay"  # compute the same batch once more, with the same random numbers, and ask again
    SKIP = "skip"  # leave the batch out
    ROLL_BACK = "rollback"  # go back to the newest whole checkpoint, and on behind this batch
    GIVE_UP = "give_up"  # the budget is spent


class Kind(Enum):
    """What was found, and the names under which it is counted."""

    NONFINITE = "nonfinite"  # again when replayed: the data or the weights, not the hardware
    TRANSIENT = "fault_transient"  # gone when replayed: a fault
    SPIKE = "spike"


@dataclass(frozen=True)
class Finding:
    """One figure that does not look right.

    Attributes:
        kind: what it is.
        name: of the figure, as in metrics.jsonl.
        value: of this step.
        median, z: what is usual, and how far off it is in robust standard deviations; NaN where value is not finite.
    """

    kind: Kind
    name: str
    value: float
    median: float = math.nan
    z: float = math.nan

    def __str__(self) -> str:
        if self.kind is Kind.SPIKE:
            return f"{self.name} {self.value:.4g} (median {self.median:.4g}, z {self.z:.1f})"
        return f"{self.name} {self.value}"


@dataclass(frozen=True)
class Decision:
    """What is to be done, and why."""

    action: Action
    findings: tuple[Finding, ...] = ()

    @property
    def reason(self) -> str:
        """The findings in words."""
        return ", ".join(map(str, self.findings))


@dataclass
class AnomalyHistory:
    """What decisions depend on, as plain data: part of every checkpoint, so that a resumed run decides the same.

    Attributes:
        series: figures of the last applied steps, oldest first.
        counts: findings and actions of the whole run, by `Kind` and `Action` value.
        spent: batches left out and roll-backs so far.
        skipped: [start, end) of the sequences that were never trained on, in order.
    """

    series: dict[str, list[float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    spent: int = 0
    skipped: list[list[int]] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """A copy that JSON could hold."""
        return {
            "series": {name: list(values) for name, values in self.series.items()},
            "counts": dict(self.counts),
            "spent": self.spent,
            "skipped": [list(span) for span in self.skipped],
        }

    @classmethod
    def of(cls, plain: Mapping[str, Any] | None) -> AnomalyHistory:
        """What `plain` gave. None (a checkpoint from before there was a history): nothing is usual yet."""
        return cls(**cls(**plain).plain()) if plain else cls()

    def count(self, what: Kind | Action) -> None:
        """One more."""
        self.counts[what.value] = self.counts.get(what.value, 0) + 1

    def skip(self, start: int, end: int) -> None:
        """Sequences [start, end) are left out; no span begins later, and spans that meet become one."""
        self.skipped = [span for span in self.skipped if span[0] < start]  # a roll-back may cover earlier ones
        if self.skipped and self.skipped[-1][1] >= start:
            self.skipped[-1][1] = end
        else:
            self.skipped.append([start, end])

    def rolled_back_to(self, older: AnomalyHistory) -> None:
        """What is usual follows from an older history again.

        What was spent stays spent, or a run that spikes again and again would roll back for ever.
        """
        self.series = older.series


class AnomalyPolicy:
    """Decides about steps, and keeps their history.

    Args:
        config: window, threshold, action and budget.
    """

    def __init__(self, config: AnomalyConfig) -> None:
        self.config = config

    def judge(self, history: AnomalyHistory, figures: Mapping[str, float], *, replayed: bool = False) -> Decision:
        """Decide about a step before it is applied, and note the decision in the history.

        Args:
            history: changed in place.
            figures: losses and gradient norm of the step by name. A modality without labels is left out.
            replayed: whether these are the figures of the second attempt at a batch, which `REPLAY` asked for.
        """
        broken = tuple(
            Finding(Kind.NONFINITE, name, value) for name, value in figures.items() if not math.isfinite(value)
        )
        if broken and not replayed:
            return Decision(Action.REPLAY, broken)
        if broken:
            history.count(Kind.NONFINITE)
            return self._spend(history, Action.SKIP, broken)
        if replayed:
            history.count(Kind.TRANSIENT)
        spikes = self._spikes(history, figures)
        if spikes:
            history.count(Kind.SPIKE)
        if spikes and self.config.action != "log":
            wanted = Action.SKIP if self.config.action == "skip" else Action.ROLL_BACK
            return self._spend(history, wanted, spikes)
        for name, value in figures.items():
            # A spike that is applied is history, too: what lasts for half a window is the new usual.
            history.series[name] = [*history.series.get(name, ()), value][-self.config.window :]
        return Decision(Action.APPLY, spikes)

    def _spikes(self, history: AnomalyHistory, figures: Mapping[str, float]) -> tuple[Finding, ...]:
        found = []
        for name, value in figures.items():
            past = history.series.get(name, [])[-self.config.window :]
            if len(past) < (self.config.window + 1) // 2:
                continue
            median, z = robust_z(value, past, logarithmic=name in _SKEWED)
            if z > self.config.threshold:
                found.append(Finding(Kind.SPIKE, name, value, median, z))
        return tuple(found)

    def _spend(self, history: AnomalyHistory, wanted: Action, findings: tuple[Finding, ...]) -> Decision:
        if history.spent >= self.config.budget:
            return Decision(Action.GIVE_UP, findings)
        history.spent += 1
        history.count(wanted)
        return Decision(wanted, findings)


def robust_z(value: float, past: Sequence[float], *, logarithmic: bool = False) -> tuple[float, float]:
    """Median of `past`, and the distance of `value` from it in robust standard deviations.

    Args:
        value: finite.
        past: finite values, at least one.
        logarithmic: measure the distance of the logarithms; values are then not negative.
    """
    if logarithmic:
        logs = [_log(other) for other in past]
        median = statistics.median(logs)
        return math.exp(median), _z(_log(value), logs, median, smallest=math.log1p(_SMALLEST_SPREAD))
    median = statistics.median(past)
    return median, _z(value, past, median, smallest=_SMALLEST_SPREAD * abs(median))


def _z(value: float, past: Sequence[float], median: float, *, smallest: float) -> float:
    spread = max(statistics.median([abs(other - median) for other in past]) / _MAD_OF_NORMAL, smallest)
    if spread == 0.0:
        return math.copysign(math.inf, value - median) if value != median else 0.0
    return (value - median) / spread


def _log(value: float) -> float:
    return math.log(max(value, sys.float_info.min))
