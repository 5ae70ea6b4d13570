"""The loop: what happens when, told by a recording of every call. No model: the stepper only counts."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

import pytest
import torch

from mmscale.config import Config
from mmscale.config.load import resolve
from mmscale.data.stream.loader import StepBatch
from mmscale.data.vocab import Vocabulary
from mmscale.errors import TrainingError
from mmscale.train.loop import Trainer
from mmscale.train.proof.synthetic import SyntheticMixture
from mmscale.train.state.train_state import TrainState
from mmscale.train.steps.batch import Batch
from mmscale.train.steps.step import StepResult, Steps
from mmscale.train.steps.step_report import StepReport, is_logged
from mmscale.train.throughput import Throughput

STEPS = 6


def config(*overrides: str) -> Config:
    shape = {"num_layers": 1, "hidden_size": 64, "ffn_hidden_size": 64, "num_attention_heads": 1}
    names = ["model.kind=dense", f"train.steps={STEPS}", "optim.warmup=2", "optim.lr=1", "optim.min_lr=0"]
    return resolve({"model": shape}, [*names, *overrides])


@dataclass
class Recording:
    """Stands for everything around the loop and writes down what it is asked."""

    config: Config
    every: int = 0
    stop_after: int | None = None
    fail_at: int | None = None
    leave_out: tuple[int, ...] = ()  # numbers of attempts that are not applied
    state: TrainState | None = None
    calls: list[str] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)

    def batches(self, state: TrainState) -> Iterator[StepBatch]:
        size = self.config.train.global_batch_size
        while True:
            self.calls.append(f"read {state.sequences // size + 1}")
            yield StepBatch(micro_batches=(), counts=(60, 40), label_counts=(50, 40), index=0)

    def take(self, batch: StepBatch, on_device: Callable[[], list[Batch]], *, lr: float) -> StepResult:
        assert on_device() == []
        self.lrs.append(lr)
        if self.fail_at == len(self.lrs):
            raise TrainingError("no")
        applied = len(self.lrs) not in self.leave_out
        if not applied:
            assert self.state is not None
            self.state.sequences += self.config.train.global_batch_size
        return StepResult(sums=torch.zeros(3, 2), grad_norm=1.0, applied=applied)

    def materialized(self) -> contextlib.nullcontext[None]:
        self.calls.append("materialize")
        return contextlib.nullcontext()

    def on_step(self, state: TrainState, report: StepReport) -> None:
        assert state.step == report.step
        assert (report.stats is not None) == is_logged(self.config, report.step)
        self.calls.append(f"hook {report.step}")

    def due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def save(self, state: TrainState, *, last: bool = False) -> None:
        self.calls.append(f"save {state.step}{' and wait' if last else ''}")

    def trainer(self, state: TrainState, stop: Callable[[], bool] | None = None) -> Trainer:
        self.state = state
        return Trainer(
            self.config,
            state=state,
            stepper=cast(Steps, self),
            guard=self,
            batches=self.batches(state),
            vocabulary=Vocabulary.from_config(self.config.vocab),
            hooks=[self],
            checkpoints=self,
            stop_requested=stop or (lambda: state.step == self.stop_after),
            clock=Throughput(),
        )


def fresh(step: int = 0) -> TrainState:
    return TrainState([], None, step=step, sequences=8 * step)


def test_trains_to_the_last_step_saves_and_says_so() -> None:
    state, recording = fresh(), Recording(config())
    assert recording.trainer(state).fit() is True
    each = [f"{what} {step}" for step in range(1, STEPS + 1) for what in ("read", "hook")]
    assert recording.calls == [*each, "materialize", f"save {STEPS} and wait"]
    assert (state.step, state.sequences, state.tokens) == (STEPS, 8 * STEPS, 100 * STEPS)
    assert state.modality_tokens == {"text": 60 * STEPS, "image": 40 * STEPS}


def test_saves_when_due_after_the_hooks_and_only_once_at_the_end() -> None:
    recording = Recording(config(), every=3)
    recording.trainer(fresh()).fit()
    saves = [call for call in recording.calls if call.startswith("save")]
    assert saves == ["save 3", "save 6 and wait"]
    at = recording.calls.index("hook 3")
    assert recording.calls[at + 1 : at + 3] == ["materialize", "save 3"]


def test_a_stop_saves_at_once_and_says_that_it_is_not_done() -> None:
    state, recording = fresh(), Recording(config(), every=3, stop_after=4)
    assert recording.trainer(state).fit() is False
    assert recording.calls[-3:] == ["hook 4", "materialize", "save 4 and wait"]
    assert state.step == 4


def test_a_stop_during_the_last_step_is_done() -> None:
    state, recording = fresh(), Recording(config(), stop_after=STEPS)
    assert recording.trainer(state).fit() is True
    assert recording.calls[-1] == f"save {STEPS} and wait" and recording.calls.count(f"save {STEPS} and wait") == 1


@pytest.mark.parametrize("stopped", [False, True])
def test_a_run_that_ends_early_saves_at_once_and_is_done(stopped: bool) -> None:
    """Held-out data decided so, by a hook; a request to stop at the same step changes nothing."""
    state, recording = fresh(), Recording(config(), every=3, stop_after=4 if stopped else None)
    trainer = recording.trainer(state)
    trainer.is_over = lambda: state.step >= 4
    assert trainer.fit() is True
    assert recording.calls[-3:] == ["hook 4", "materialize", "save 4 and wait"]


def test_goes_on_where_the_state_stands() -> None:
    """The same learning rates and reads as in one go: nothing is counted from the start of the process."""
    whole, first, second = (Recording(config()) for _ in range(3))
    whole.trainer(fresh()).fit()
    first.stop_after = 4
    first.trainer(fresh()).fit()
    second.trainer(fresh(4)).fit()
    assert first.lrs + second.lrs == whole.lrs
    assert [*first.calls[:-2], *second.calls] == whole.calls  # without the save of the stop


def test_a_run_that_is_done_reads_nothing() -> None:
    recording = Recording(config())
    assert recording.trainer(fresh(STEPS)).fit() is True
    assert recording.calls == []


def test_a_batch_that_is_left_out_takes_no_step() -> None:
    """The step is taken with the next batch, at its own learning rate; hooks and saves see applied steps only."""
    plain, recording = Recording(config()), Recording(config(), leave_out=(2, 3))
    plain.trainer(fresh()).fit()
    state = fresh()
    recording.trainer(state).fit()
    assert recording.calls[:6] == ["read 1", "hook 1", "read 2", "read 3", "read 4", "hook 2"]
    assert recording.lrs == [plain.lrs[0], plain.lrs[1], plain.lrs[1], *plain.lrs[1:]]
    assert (state.step, state.sequences, state.tokens) == (STEPS, 8 * (STEPS + 2), 100 * STEPS)


def test_every_update_has_a_learning_rate_and_the_schedule_ends_after_the_last_one() -> None:
    recording = Recording(config())
    recording.trainer(fresh()).fit()
    assert recording.lrs == pytest.approx([0.5, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_an_error_saves_nothing_and_asks_nobody() -> None:
    """The other ranks may be gone: the error path runs no collectives."""
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return False

    recording = Recording(config(), every=1, fail_at=3)
    with pytest.raises(TrainingError):
        recording.trainer(fresh(), stop=stop).fit()
    assert recording.calls[-1] == "read 3" and "save 3" not in recording.calls
    assert len(asked) == 2


def test_the_first_and_the_last_step_are_logged_and_every_nth() -> None:
    settings = config("log.every=4", "train.steps=10")
    assert [step for step in range(1, 11) if is_logged(settings, step)] == [1, 4, 8, 10]


def test_figures_of_a_replayed_batch_are_those_of_the_replay() -> None:
    """A fault of hardware gives NaN everywhere; the second attempt is the one that is logged."""
    settings = config("train.steps=1", "optim.warmup=0", "model.seq_length=32")
    mixture = SyntheticMixture(settings, share={"text": 0.5, "image": 0.5})
    found: list[dict[tuple[int, str], tuple[float, float]]] = []

    class Replaying(Recording):
        def batches(self, state: TrainState) -> Iterator[StepBatch]:
            parts = tuple(mixture.micro_batch(number) for number in range(2))
            yield StepBatch(micro_batches=parts, counts=(60, 40), label_counts=(50, 40), index=0)

        def take(self, batch: StepBatch, on_device: Callable[[], list[Batch]], *, lr: float) -> StepResult:
            for value in (math.nan, 1.0):
                for number, part in enumerate(on_device()):
                    assert part.params.stats is not None
                    part.params.stats.add(1, "norm", torch.tensor(value), micro_batch=number)
            return StepResult(sums=torch.zeros(3, 2), grad_norm=1.0, applied=True)

        def on_step(self, state: TrainState, report: StepReport) -> None:
            assert report.stats is not None
            found.append(report.stats.read())

    Replaying(settings).trainer(fresh()).fit()
    assert found == [{(1, "norm"): (2.0, 2.0)}]
