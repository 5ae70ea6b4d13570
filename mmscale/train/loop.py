"""The training loop: reads top to bottom, says when and not how.

New wishes become a hook or a part of a step, never an `if` in the loop. The error path runs no collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from mmscale.config import Config
from mmscale.config.derived import tokens_per_step
from mmscale.data.loader import StepBatch
from mmscale.data.vocab import Vocabulary
from mmscale.model.mixed_modal import RoutingStats
from mmscale.train.batch import to_device
from mmscale.train.schedule import learning_rate
from mmscale.train.state import TrainState
from mmscale.train.step import Stepper, StepResult
from mmscale.train.throughput import DATA_WAIT, SAVE_STALL, Throughput


class StepReport:
    """What hooks learn of a step.

    Attributes:
        step: its number, from 1.
        batch: what it was trained on (this rank's part, and the global counts).
        result: losses and gradient norm.
        lr: learning rate.
        stats: routing figures, on logged steps.
    """

    def __init__(
        self, *, step: int, batch: StepBatch, result: StepResult, lr: float, stats: RoutingStats | None
    ) -> None:
        self.step = step
        self.batch = batch
        self.result = result
        self.lr = lr
        self.stats = stats


class Hook(Protocol):
    """Something that happens after a step, on every rank."""

    def on_step(self, state: TrainState, report: StepReport) -> None:
        """Called after every optimizer step."""


class Checkpoints(Protocol):
    """Says when to save, and saves."""

    def due(self, step: int) -> bool:
        """Whether the schedule asks for a checkpoint after this step."""

    def save(self, state: TrainState) -> None:
        """Write and commit; every rank calls it."""


class Trainer:
    """Fits a model to a stream of batches.

    Args:
        config: steps, schedule, logging.
        state: where the run stands; goes on from there.
        stepper: takes optimizer steps.
        batches: this rank's part of every global batch, from the state's place on.
        vocabulary: gives labels their modality.
        hooks: what happens after a step, in order.
        checkpoints: when and how to save.
        stop_requested: whether to stop at this border; the same answer on every rank.
        clock: measures waiting and saving.
    """

    def __init__(
        self,
        config: Config,
        *,
        state: TrainState,
        stepper: Stepper,
        batches: Iterator[StepBatch],
        vocabulary: Vocabulary,
        hooks: Sequence[Hook],
        checkpoints: Checkpoints,
        stop_requested: Callable[[], bool],
        clock: Throughput,
    ) -> None:
        self.config = config
        self.state = state
        self.stepper = stepper
        self.batches = batches
        self.vocabulary = vocabulary
        self.hooks = hooks
        self.checkpoints = checkpoints
        self.stop_requested = stop_requested
        self.clock = clock

    def fit(self) -> bool:
        """Train to the last step. False: stopped on request after a save, so the run should be started again."""
        state, steps = self.state, self.config.train.steps
        while state.step < steps:
            with self.clock.measure(DATA_WAIT):
                batch = next(self.batches)
            report = self._step(batch)
            self._advance(batch)
            for hook in self.hooks:
                hook.on_step(state, report)
            stop = self.stop_requested()
            if stop or state.step == steps or self.checkpoints.due(state.step):
                with self.clock.measure(SAVE_STALL), self.stepper.settled():
                    self.checkpoints.save(state)
            if stop:
                break
        return state.step >= steps

    def _step(self, batch: StepBatch) -> StepReport:
        step = self.state.step + 1
        stats = RoutingStats() if self._logged(step) else None
        lr = learning_rate(
            self.config.optim, step=step, steps=self.config.train.steps, tokens_per_step=tokens_per_step(self.config)
        )
        micro_batches = [to_device(part, self.vocabulary, stats=stats) for part in batch.micro_batches]
        result = self.stepper.train(micro_batches, lr=lr)
        return StepReport(step=step, batch=batch, result=result, lr=lr, stats=stats)

    def _advance(self, batch: StepBatch) -> None:
        state = self.state
        state.step += 1
        state.sequences += self.config.train.global_batch_size
        state.tokens += sum(batch.counts)
        for name, count in zip(self.config.vocab.names, batch.counts, strict=True):
            state.modality_tokens[name] = state.modality_tokens.get(name, 0) + count
        self.clock.step(sum(batch.counts))

    def _logged(self, step: int) -> bool:
        return is_logged(self.config, step)


def is_logged(config: Config, step: int) -> bool:
    """Whether this step's figures are fetched from the device and written down."""
    return step == 1 or step % config.log.every == 0 or step == config.train.steps
