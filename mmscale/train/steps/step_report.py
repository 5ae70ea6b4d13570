"""The data of a step for hooks and logs, and which steps are logged."""

from __future__ import annotations

from mmscale.config import Config
from mmscale.data.stream.loader import StepBatch
from mmscale.model.mixed_modal import RoutingStats
from mmscale.train.steps.step import StepResult


class StepReport:
    """The data of a step for hooks.

    Attributes:
        step: its number, from 1.
        batch: its batch (this rank's part, and the global counts).
        result: losses and gradient norm.
        lr: learning rate.
        stats: routing metrics, on logged steps.
    """

    def __init__(
        self, *, step: int, batch: StepBatch, result: StepResult, lr: float, stats: RoutingStats | None
    ) -> None:
        self.step = step
        self.batch = batch
        self.result = result
        self.lr = lr
        self.stats = stats


def is_logged(config: Config, step: int) -> bool:
    """Whether this step's metrics are fetched from the device and written."""
    return step == 1 or step % config.log.every == 0 or step == config.train.steps


def routing_stats(config: Config, step: int) -> RoutingStats | None:
    """Collects a step's routing metrics, split by modality if layers.jsonl gets them; None: the step is not logged."""
    if not is_logged(config, step):
        return None
    every = config.log.layers_every * config.log.every
    whole = every > 0 and (step == 1 or step % every == 0 or step == config.train.steps)
    return RoutingStats(modalities=len(config.vocab.names) if whole else 0)
