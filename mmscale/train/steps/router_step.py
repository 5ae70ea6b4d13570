"""Steps of the auxiliary stage: the frozen model runs forward without gradients, and only its routers are updated."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mmscale.data.stream.answer_requests import WantedTokens
from mmscale.train.steps.auxiliary_routers import AuxiliaryTrainer, summary
from mmscale.train.steps.batch import Batch
from mmscale.train.steps.step import Stepper, StepResult


class RouterStepper:
    """Computes and applies steps of the routers (`Steps`).

    Args:
        forward: runs the model, without optimizer.
        trainer: the routers with their optimizer.
    """

    def __init__(self, forward: Stepper, trainer: AuxiliaryTrainer) -> None:
        self.forward = forward
        self.trainer = trainer
        self._before_reduction: Callable[[], None] = lambda: None

    @property
    def modules(self) -> Sequence[torch.nn.Module]:
        """The chunks: main weights and routers."""
        return self.forward.chunks

    def accumulate(self, batches: Sequence[Batch]) -> Tensor:
        """Run these batches forward; the routers learn from them."""
        self.trainer.begin(batches)
        return self.forward.evaluate(batches)

    def compute(self, batches: Sequence[Batch]) -> StepResult:
        """Gradient norm and loss of the routers; not applied yet."""
        self.accumulate(batches)
        self._before_reduction()
        found = self.trainer.measure()
        losses = {} if found.loss is None else {"loss": found.loss}
        return StepResult(grad_norm=found.grad_norm, applied=False, losses=losses)

    def apply(self, computed: StepResult, *, lr: float) -> StepResult:
        """Take the optimizer step of the routers."""
        return replace(computed, applied=self.trainer.apply(computed.grad_norm, lr=lr))

    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """Loss sums of the model; routers do not learn."""
        return self.forward.evaluate(batches)

    def pick(self, batches: Sequence[Batch], wanted: Sequence[WantedTokens]) -> list[Tensor]:
        """As `Steps.pick`."""
        return self.forward.pick(batches, wanted)

    def figures(self) -> dict[str, float]:
        """Loss, accuracy and the like of the last step's batches, means over layers; every rank calls it."""
        return summary(self.trainer.figures())

    def materialized(self) -> contextlib.AbstractContextManager[None]:
        """Nothing to do: parameters are gathered as soon as a step is applied."""
        return self.forward.materialized()

    def before_reduction(self, call: Callable[[], None]) -> None:
        """From now on, call this when all micro-batches of a step have gone forward."""
        self._before_reduction = call
