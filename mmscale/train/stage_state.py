"""The state of a stage as all packages of training use it: counters, histories of held-out values, and a protocol.

state/train_state.py implements it for main runs, state/router_state.py for the auxiliary stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from mmscale.resilience.anomaly import AnomalyHistory


@dataclass
class HeldOutTrend:
    """Summary of the history of a value for which lower is better.

    Attributes:
        best: lowest finite value; infinite before the first one.
        best_step: step of it; 0 before the first one.
        step: of the latest evaluation.
        last: its value.
        since: evaluations after the best one.
        rising: evaluations in a row with a higher value than the one before.
    """

    best: float = math.inf
    best_step: int = 0
    step: int = 0
    last: float = math.inf
    since: int = 0
    rising: int = 0

    def add(self, step: int, value: float) -> None:
        """Add an evaluation. A value that is not finite is never the best one.

        A step that was already added is ignored, because an attempt may repeat evaluations.
        """
        if step <= self.step:
            return
        self.rising = self.rising + 1 if value > self.last else 0
        self.step, self.last = step, value
        if value < self.best:
            self.best, self.best_step, self.since = value, step, 0
        else:
            self.since += 1


def trends_to_plain(trends: Mapping[str, HeldOutTrend]) -> dict[str, Any]:
    """Trends as plain data for a checkpoint."""
    return {name: asdict(trend) for name, trend in trends.items()}


def trends_from_plain(saved: Mapping[str, Any] | None) -> dict[str, HeldOutTrend]:
    """The inverse of `trends_to_plain`; empty for a checkpoint without trends."""
    return {name: HeldOutTrend(**trend) for name, trend in (saved or {}).items()}


@dataclass(kw_only=True)
class Counters:
    """The progress of a stage: the part of its state that the trainer advances.

    Attributes:
        step: optimizer steps done.
        sequences: sequences consumed over all ranks, skipped ones included: the position in the data.
        tokens: tokens trained on, padding not counted.
        modality_tokens: the same by modality.
        anomalies: history that decisions about later steps depend on. Empty from older checkpoints without it.
        stream: settings that define the order of the data, before and after each change of them
            (mmscale.data.stream.segments); they give a sequence's number its meaning. Empty in older checkpoints.
        watched: trends of held-out values by name.
    """

    step: int = 0
    sequences: int = 0
    tokens: int = 0
    modality_tokens: dict[str, int] = field(default_factory=dict)
    anomalies: AnomalyHistory = field(default_factory=AnomalyHistory)
    stream: list[dict[str, Any]] = field(default_factory=list)
    watched: dict[str, HeldOutTrend] = field(default_factory=dict)

    def progress(self) -> dict[str, Any]:
        """The counters, as plain data."""
        return {
            "step": self.step,
            "sequences": self.sequences,
            "stream": self.stream,
            "tokens": self.tokens,
            "modality_tokens": dict(self.modality_tokens),
            "anomalies": self.anomalies.plain(),
            "watched": trends_to_plain(self.watched),
        }

    def restore_progress(self, plain: Mapping[str, Any]) -> None:
        """Restore the result of `progress`."""
        progress = dict(plain)
        self.anomalies = AnomalyHistory.of(progress.pop("anomalies", None))
        self.watched = trends_from_plain(progress.pop("watched", None))
        for name, value in progress.items():
            setattr(self, name, value)


class StageState(Protocol):
    """The state of a stage: counters, the tensors that checkpoints store, and those that the memory tier copies."""

    step: int
    sequences: int
    tokens: int
    modality_tokens: dict[str, int]
    anomalies: AnomalyHistory
    stream: list[dict[str, Any]]
    watched: dict[str, HeldOutTrend]

    def sharded(self, *, loading: bool) -> dict[str, Any]:
        """The sharded state dict of this rank: tensors as ShardedTensors with global keys, counters as they are."""

    def restore(self, loaded: dict[str, Any]) -> None:
        """Restore the result of `checkpoint.sharded.read`."""

    def progress(self) -> dict[str, Any]:
        """The counters, as plain data."""

    def restore_progress(self, plain: Mapping[str, Any]) -> None:
        """Restore the result of `progress`."""

    def optimizers(self) -> list[MegatronOptimizer]:
        """The optimizers whose shards this rank holds."""

    def local_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The model's tensors that no optimizer holds, by name."""

    def scaled(self) -> Iterator[tuple[str, Any]]:
        """Modules of Transformer-Engine that keep FP8 scales, by name."""

    def gather(self) -> None:
        """Fill the parameters from the optimizers' shards of all ranks; every rank calls it."""
