"""The training loop. It reads from top to bottom and does not depend on stages, which pass their parts in.

Add features as a hook or as a part of a step, never as an `if` in the loop. The error path runs no collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from mmscale.config import Config
from mmscale.data.stream.loader import StepBatch
from mmscale.data.vocab import Vocabulary
from mmscale.train.optim.schedule import learning_rate
from mmscale.train.stage_state import StageState
from mmscale.train.steps.batch import Batch, to_device
from mmscale.train.steps.step import StepResult, Steps
from mmscale.train.steps.step_report import StepReport, routing_stats
from mmscale.train.throughput import DATA_WAIT, SAVE_STALL, Throughput


class Hook(Protocol):
    """An action after every step, on every rank."""

    def on_step(self, state: StageState, report: StepReport) -> None:
        """Called after every optimizer step."""


class StepRunner(Protocol):
    """Takes steps."""

    def take(self, batch: StepBatch, on_device: Callable[[], list[Batch]], *, lr: float) -> StepResult:
        """Take one optimizer step. If it was not applied, the state is past the batch, or back at a checkpoint."""


class Checkpoints(Protocol):
    """Decides when to save, and saves."""

    def due(self, step: int) -> bool:
        """Whether the schedule asks for a checkpoint after this step."""

    def save(self, state: StageState, *, last: bool = False) -> None:
        """Begin a save; if `last`, wait until it is committed. Every rank calls it."""


class Trainer:
    """Fits a model to a stream of batches.

    Args:
        config: steps, schedule, logging.
        state: the state of the run to continue from.
        stepper: computes.
        guard: takes steps with the stepper, and decides which are applied.
        batches: this rank's part of every global batch, starting at the state's position in the data.
        vocabulary: gives the modality of labels.
        hooks: called after a step, in order.
        checkpoints: when and how to save.
        stop_requested: whether to stop at this step boundary; the same answer on every rank.
        is_over: whether nothing is left to train, the same answer on every rank; default: after the last step.
        clock: measures waiting and saving.
    """

    def __init__(
        self,
        config: Config,
        *,
        state: StageState,
        stepper: Steps,
        guard: StepRunner,
        batches: Iterator[StepBatch],
        vocabulary: Vocabulary,
        hooks: Sequence[Hook],
        checkpoints: Checkpoints,
        stop_requested: Callable[[], bool],
        clock: Throughput,
        is_over: Callable[[], bool] | None = None,
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
        self.is_over = is_over or (lambda: state.step >= config.train.steps)
        self.clock = clock

    def fit(self) -> bool:
        """Train to the end. False: stopped on request after a save, so the run should be started again."""
        state = self.state
        while not self.is_over():
            report = self._step()
            self._advance(report.batch)
            for hook in self.hooks:
                hook.on_step(state, report)
            stop = self.stop_requested()
            last = stop or self.is_over()
            if last or self.checkpoints.due(state.step):
                with self.clock.measure(SAVE_STALL), self.stepper.materialized():
                    self.checkpoints.save(state, last=last)
            if stop:
                break
        return self.is_over()

    def _step(self) -> StepReport:
        """Takes steps until one is applied, and returns it.

        Batches before it may be skipped, and the state may be rolled back.
        """
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
            if stats is not None:  # a replay computes the same micro-batches again
                stats.clear()
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
