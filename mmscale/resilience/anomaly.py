"""The anomaly policy: decides about abnormal losses and gradients from plain numbers.

It does not depend on models, checkpoints or process groups: the step guard of mmscale.train calls it before the
optimizer applies a step and carries out the decision. Every rank calls it with the same numbers and keeps the same
history, so decisions need no communication.

Spikes are found by a robust z-score, (x - median) / (1.4826 MAD) over the last applied steps. Unlike mean and standard
deviation, median and MAD hardly change when a tenth of the window are spikes. On request a spike is handled by PaLM's
rule: return to a checkpoint and skip the data around the spike (arXiv 2204.02311, section 5.1).
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
# A spread below this share of the median is rounding, not noise: the first change of a constant series would be a
# spike.
_SMALLEST_SPREAD = 0.01
# Compared by logarithm: gradient norms are positive and nearly log-normal. With a spread of 30 %, six standard
# deviations of the norm itself would classify a healthy step in 3,000 as a spike.
_NORM = "grad_norm"
_SKEWED = (_NORM,)


class StepAction(Enum):
    """The action for a step whose gradients are computed."""

    APPLY = "apply"
    REPLAY = "replay"  # compute the same batch once more, with the same random numbers, and decide again
    SKIP = "skip"  # skip the batch
    ROLL_BACK = "rollback"  # return to the newest intact checkpoint, and continue after this batch
    GIVE_UP = "give_up"  # the budget is used up


class AnomalyKind(Enum):
    """Kinds of findings, with the names under which they are counted."""

    NONFINITE = "nonfinite"  # found again in the replay: bad data or weights, not hardware
    TRANSIENT = "fault_transient"  # gone in the replay: a hardware fault
    SPIKE = "spike"
    LIMIT = "above_limit"  # gradient norm above optim.grad_norm_skip_threshold


@dataclass(frozen=True)
class Finding:
    """One abnormal value.

    Attributes:
        kind: of the finding.
        name: of the value, as in metrics.jsonl.
        value: of this step.
        median, z: of a spike: normal value, and the distance from it in robust standard deviations.
        limit: that the value exceeds, of `AnomalyKind.LIMIT`.
    """

    kind: AnomalyKind
    name: str
    value: float
    median: float = math.nan
    z: float = math.nan
    limit: float = math.nan

    def __str__(self) -> str:
        if self.kind is AnomalyKind.LIMIT:
            return f"{self.name} {self.value:.4g} (above {self.limit:g}, grad_norm_skip_threshold)"
        if self.kind is AnomalyKind.SPIKE:
            return f"{self.name} {self.value:.4g} (median {self.median:.4g}, z {self.z:.1f})"
        return f"{self.name} {self.value}"


@dataclass(frozen=True)
class StepDecision:
    """An action and its reasons."""

    action: StepAction
    findings: tuple[Finding, ...] = ()

    @property
    def reason(self) -> str:
        """The findings as text."""
        return ", ".join(map(str, self.findings))


@dataclass
class AnomalyHistory:
    """The state that decisions depend on, as plain data.

    It is part of every checkpoint, so that a resumed run decides the same.

    Attributes:
        series: values of the last applied steps, oldest first.
        counts: findings and actions of the whole run, by `AnomalyKind` and `StepAction` value.
        spent: skipped batches and roll-backs so far.
        skipped: [start, end) of the sequences that were never trained on, in order.
        anew_from: step of this attempt's `begin_anew`; not kept.
    """

    series: dict[str, list[float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    spent: int = 0
    skipped: list[list[int]] = field(default_factory=list)
    anew_from: int = field(default=-1, compare=False)

    def plain(self) -> dict[str, Any]:
        """A JSON-compatible copy."""
        return {
            "series": {name: list(values) for name, values in self.series.items()},
            "counts": dict(self.counts),
            "spent": self.spent,
            "skipped": [list(span) for span in self.skipped],
        }

    @classmethod
    def of(cls, plain: Mapping[str, Any] | None) -> AnomalyHistory:
        """The history from the result of `plain`.

        None (a checkpoint from before histories existed) gives an empty one.
        """
        return cls(**cls(**plain).plain()) if plain else cls()

    def count(self, what: AnomalyKind | StepAction) -> None:
        """Count a finding or an action."""
        self.counts[what.value] = self.counts.get(what.value, 0) + 1

    def skip(self, start: int, end: int) -> None:
        """Skip sequences [start, end). No recorded span starts later; adjacent spans are merged."""
        self.skipped = [span for span in self.skipped if span[0] < start]  # a roll-back may cover earlier spans
        if self.skipped and self.skipped[-1][1] >= start:
            self.skipped[-1][1] = end
        else:
            self.skipped.append([start, end])

    def begin_anew(self, *, step: int) -> None:
        """Forget the values up to this step: from here on they are of other data, batches or sequences."""
        self.series.clear()
        self.anew_from = step

    def rolled_back_to(self, older: AnomalyHistory, *, step: int) -> None:
        """Restore the values of the history of a checkpoint, but none from before `begin_anew`.

        The used budget is kept, otherwise a run with repeated spikes would roll back for ever.

        Args:
            older: of the checkpoint.
            step: of the checkpoint.
        """
        self.series = {} if step <= self.anew_from else older.series


class AnomalyPolicy:
    """Decides about steps and maintains their history.

    Args:
        config: window, threshold, action and budget.
        largest_norm: a step with a larger gradient norm is skipped; None: no limit.
    """

    def __init__(self, config: AnomalyConfig, *, largest_norm: float | None = None) -> None:
        self.config = config
        self.largest_norm = largest_norm

    def judge(self, history: AnomalyHistory, figures: Mapping[str, float], *, replayed: bool = False) -> StepDecision:
        """Decide about a step before it is applied, and record the decision in the history.

        Args:
            history: changed in place.
            figures: losses and gradient norm of the step by name. A modality without labels is missing.
            replayed: whether these are the values of the second attempt at a batch, requested by `REPLAY`.
        """
        broken = tuple(
            Finding(AnomalyKind.NONFINITE, name, value) for name, value in figures.items() if not math.isfinite(value)
        )
        if broken and not replayed:
            return StepDecision(StepAction.REPLAY, broken)
        if broken:
            history.count(AnomalyKind.NONFINITE)
            return self._spend(history, StepAction.SKIP, broken)
        if replayed:
            history.count(AnomalyKind.TRANSIENT)
        if above := self._above(figures):
            history.count(AnomalyKind.LIMIT)
            return self._spend(history, StepAction.SKIP, above)
        spikes = self._spikes(history, figures)
        if spikes:
            history.count(AnomalyKind.SPIKE)
        if spikes and self.config.action != "log":
            wanted = StepAction.SKIP if self.config.action == "skip" else StepAction.ROLL_BACK
            return self._spend(history, wanted, spikes)
        for name, value in figures.items():
            # An applied spike is part of the history: a change that lasts for half a window becomes the normal range.
            history.series[name] = [*history.series.get(name, ()), value][-self.config.window :]
        return StepDecision(StepAction.APPLY, spikes)

    def _above(self, figures: Mapping[str, float]) -> tuple[Finding, ...]:
        norm = figures.get(_NORM)
        if self.largest_norm is None or norm is None or norm <= self.largest_norm:
            return ()
        return (Finding(AnomalyKind.LIMIT, _NORM, norm, limit=self.largest_norm),)

    def _spikes(self, history: AnomalyHistory, figures: Mapping[str, float]) -> tuple[Finding, ...]:
        found = []
        for name, value in figures.items():
            past = history.series.get(name, [])[-self.config.window :]
            if len(past) < (self.config.window + 1) // 2:
                continue
            median, z = robust_z(value, past, logarithmic=name in _SKEWED)
            if z > self.config.threshold:
                found.append(Finding(AnomalyKind.SPIKE, name, value, median, z))
        return tuple(found)

    def _spend(self, history: AnomalyHistory, wanted: StepAction, findings: tuple[Finding, ...]) -> StepDecision:
        if history.spent >= self.config.budget:
            return StepDecision(StepAction.GIVE_UP, findings)
        history.spent += 1
        history.count(wanted)
        return StepDecision(wanted, findings)


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
