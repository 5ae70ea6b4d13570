"""The training loop: reads top to bottom, says when and not how. It knows no stage: it is given one's parts.

New wishes become a hook or a part of a step, never an `if` in the loop. The error path runs no collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from mmscale.config import Config
from mmscale.data.loader import StepBatch
from mmscale.data.vocab import Vocabulary
from mmscale.model.mixed_modal import RoutingStats
from mmscale.train.batch import Batch, to_device
from mmscale.train.schedule import learning_rate
from mmscale.train.state import StageState
from mmscale.train.step import StepResult, Steps
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

    def on_step(self, state: StageState, report: StepReport) -> None:
        """Called after every optimizer step."""


class Guard(Protocol):
    """Takes steps."""

    def take(self, batch: StepBatch, on_device: Callable[[], list[Batch]], *, lr: float) -> StepResult:
        """One optimizer step. If it was not applied the state has moved: past the batch, or back to a checkpoint."""


class Checkpoints(Protocol):
    """Says when to save, and saves."""

    def due(self, step: int) -> bool:
        """Whether the schedule asks for a checkpoint after this step."""

    def save(self, state: StageState, *, last: bool = False) -> None:
        """Begin a save, or wait for it to be committed if it is the last one; every rank calls it."""


class Trainer:
    """Fits a model to a stream of batches.

    Args:
        config: steps, schedule, logging.
        state: where the run stands; goes on from there.
        stepper: what computes.
        guard: takes steps with it, and decides which are applied.
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
        state: StageState,
        stepper: Steps,
        guard: Guard,
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
        self.guard = guard
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
            report = self._step()
            self._advance(report.batch)
            for hook in self.hooks:
                hook.on_step(state, report)
            stop = self.stop_requested()
            last = stop or state.step == steps
            if last or self.checkpoints.due(state.step):
                with self.clock.measure(SAVE_STALL), self.stepper.settled():
                    self.checkpoints.save(state, last=last)
            if stop:
                break
        return state.step >= steps

    def _step(self) -> StepReport:
        """The next step that is applied; batches before it may be left out, and the state may go back."""
        while True:
            with self.clock.measure(DATA_WAIT):
                batch = next(self.batches)
            report = self._try(batch)
            if report.result.applied:
                return report

    def _try(self, batch: StepBatch) -> StepReport:
        step = self.state.step + 1
        stats = routing_stats(self.config, step)
        lr = self._learning_rate(step)

        def on_device() -> list[Batch]:
            return [to_device(part, self.vocabulary, stats=stats) for part in batch.micro_batches]

        result = self.guard.take(batch, on_device, lr=lr)
        return StepReport(step=step, batch=batch, result=result, lr=lr, stats=stats)

    def _learning_rate(self, step: int) -> float:
        config = self.config
        return learning_rate(config.optim, step=step, steps=config.train.steps, tokens=self.state.tokens)

    def _advance(self, batch: StepBatch) -> None:
        state = self.state
        state.step += 1
        state.sequences += self.config.train.global_batch_size
        state.tokens += sum(batch.counts)
        for name, count in zip(self.config.vocab.names, batch.counts, strict=True):
            state.modality_tokens[name] = state.modality_tokens.get(name, 0) + count
        self.clock.step(sum(batch.counts))


def is_logged(config: Config, step: int) -> bool:
    """Whether this step's figures are fetched from the device and written down."""
    return step == 1 or step % config.log.every == 0 or step == config.train.steps


def routing_stats(config: Config, step: int) -> RoutingStats | None:
    """Where layers report figures of a step, split by modality where layers.jsonl gets them; None: nobody asks."""
    if not is_logged(config, step):
        return None
    every = config.log.layers_every * config.log.every
    whole = every > 0 and (step == 1 or step % every == 0 or step == config.train.steps)
    return RoutingStats(modalities=len(config.vocab.names) if whole else 0)
