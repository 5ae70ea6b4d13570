"""The state of a stage as every room of training sees it: counters, courses of held-out figures, and a protocol.

What a main run keeps is in state/train_state.py, what the auxiliary stage keeps in state/router_state.py.
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
class Course:
    """How a figure has gone, where lower is better.

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
        """Take in an evaluation. A value that is not finite is never the best one.

        One of a step that was evaluated already is left out: an attempt may repeat it.
        """
        if step <= self.step:
            return
        self.rising = self.rising + 1 if value > self.last else 0
        self.step, self.last = step, value
        if value < self.best:
            self.best, self.best_step, self.since = value, step, 0
        else:
            self.since += 1


def plain_courses(courses: Mapping[str, Course]) -> dict[str, Any]:
    """Courses as a checkpoint keeps them."""
    return {name: asdict(course) for name, course in courses.items()}


def courses_of(saved: Mapping[str, Any] | None) -> dict[str, Course]:
    """What `plain_courses` was given; nothing from a checkpoint without it."""
    return {name: Course(**course) for name, course in (saved or {}).items()}


@dataclass(kw_only=True)
class Counters:
    """Where a stage stands: the part of its state that the trainer moves on.

    Attributes:
        step: optimizer steps done.
        sequences: sequences consumed, over all ranks, those left out too: the place in the data.
        tokens: tokens trained on, padding not counted.
        modality_tokens: the same by modality.
        anomalies: what decisions about coming steps depend on. A checkpoint from before it was kept gives an empty one.
        stream: what a sequence's number means: settings of the data's order, before and after each change of them
            (mmscale.data.stream.segments). Empty in checkpoints from before it was kept.
        watched: courses of held-out figures by name.
    """

    step: int = 0
    sequences: int = 0
    tokens: int = 0
    modality_tokens: dict[str, int] = field(default_factory=dict)
    anomalies: AnomalyHistory = field(default_factory=AnomalyHistory)
    stream: list[dict[str, Any]] = field(default_factory=list)
    watched: dict[str, Course] = field(default_factory=dict)

    def progress(self) -> dict[str, Any]:
        """The counters, as plain data."""
        return {
            "step": self.step,
            "sequences": self.sequences,
            "stream": self.stream,
            "tokens": self.tokens,
            "modality_tokens": dict(self.modality_tokens),
            "anomalies": self.anomalies.plain(),
            "watched": plain_courses(self.watched),
        }

    def restore_progress(self, plain: Mapping[str, Any]) -> None:
        """Take over what `progress` gave."""
        progress = dict(plain)
        self.anomalies = AnomalyHistory.of(progress.pop("anomalies", None))
        self.watched = courses_of(progress.pop("watched", None))
        for name, value in progress.items():
            setattr(self, name, value)


class StageState(Protocol):
    """The state of a stage: counters, what its checkpoints keep, and what a rank's own memory keeps."""

    step: int
    sequences: int
    tokens: int
    modality_tokens: dict[str, int]
    anomalies: AnomalyHistory
    stream: list[dict[str, Any]]
    watched: dict[str, Course]

    def sharded(self, *, loading: bool) -> dict[str, Any]:
        """The sharded state dict of this rank: tensors as ShardedTensors with global keys, counters as they are."""

    def restore(self, loaded: dict[str, Any]) -> None:
        """Take over what `checkpoint.sharded.read` gave."""

    def progress(self) -> dict[str, Any]:
        """The counters, as plain data."""

    def restore_progress(self, plain: Mapping[str, Any]) -> None:
        """Take over what `progress` gave."""

    def optimizers(self) -> list[MegatronOptimizer]:
        """The optimizers whose shards this rank holds."""

    def local_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What the model keeps besides optimized parameters, by name."""

    def scaled(self) -> Iterator[tuple[str, Any]]:
        """Modules of Transformer-Engine that keep FP8 scales, by name."""

    def gather(self) -> None:
        """Fill the parameters from the optimizers' shards of all ranks; every rank calls it."""
