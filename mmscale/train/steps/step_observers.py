"""Components that learn from the main model's passes: routers of a joint run, cut-offs, biases, loss weights, scales.

An observer is called before a step's batches go forward, and after the step was applied. What it learns from a step
changes nothing that the loss or gradient of that step depend on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mmscale.config import Config
from mmscale.model.freezing import frozen_groups
from mmscale.model.step_sums import Loads, StepSums
from mmscale.model.thresholds import Cutoffs, move
from mmscale.model.token_choice import balance
from mmscale.train.steps.auxiliary_routers import AuxiliaryTrainer
from mmscale.train.steps.batch import Batch
from mmscale.train.steps.fp8_scales import DelayedScaling, RoundingSteps, scales_of
from mmscale.train.steps.loss_weights import LossWeights, loss_weights_of


class StepObserver(Protocol):
    """Learns from the passes of the main model."""

    def begin(self, batches: Sequence[Batch]) -> None:
        """These batches go forward next; forget the data of earlier ones."""

    def finish(self, *, lr: float) -> None:
        """The main model took the step, with this learning rate. Every rank calls it."""


class JointRouters:
    """Auxiliary routers that take their own step after each of the main model's.

    Their learning rate follows the main schedule's shape, with their own peak, `auxiliary.optim.lr`.
    """

    def __init__(self, config: Config, trainer: AuxiliaryTrainer) -> None:
        self.trainer = trainer
        self.scale = config.auxiliary.optim.lr / config.optim.lr

    def begin(self, batches: Sequence[Batch]) -> None:
        """Let the routers learn from these batches."""
        self.trainer.begin(batches)

    def finish(self, *, lr: float) -> None:
        """Take a step of the routers. A gradient that is not finite leaves them unchanged."""
        self.trainer.step(lr=lr * self.scale)


class _BufferUpdates(ABC):
    """Updates buffers after each step from sums over all its micro-batches on all ranks."""

    def __init__(self, config: Config, groups: ProcessGroupCollection, sums: StepSums, field: str) -> None:
        """`field` is the field of MixedModalParams by which layers get `sums`."""
        self._frozen = frozen_groups(config)
        self._groups, self._sums, self._field = groups, sums, field

    def begin(self, batches: Sequence[Batch]) -> None:
        """Collect these batches' sums."""
        self._sums.clear()
        for batch in batches:
            setattr(batch.params, self._field, self._sums)

    @torch.no_grad()
    def finish(self, *, lr: float) -> None:
        """Update the buffers, with one reduction over data-parallel and context-parallel ranks."""
        del lr
        found = [self._sums.sums[key] for key in sorted(self._sums.sums) if key[1] not in self._frozen]
        if not found:
            return
        flat = torch.cat([sums for _, sums in found])
        torch.distributed.all_reduce(flat, group=self._groups.dp_cp)
        for (buffer, _), sums in zip(found, flat.split([sums.numel() for _, sums in found]), strict=True):
            self._update(buffer, sums)

    @abstractmethod
    def _update(self, buffer: Tensor, sums: Tensor) -> None:
        """Change a buffer in place, from the sums of all ranks."""


class ThresholdAverages(_BufferUpdates):
    """Moves the thresholds of Expert Threshold (arXiv 2603.11535) towards each step's cut-offs.

    Tensor- and expert-parallel ranks have seen the same logits.
    """

    def __init__(self, config: Config, groups: ProcessGroupCollection) -> None:
        super().__init__(config, groups, Cutoffs(), "cutoffs")
        self._decay = config.model.experts.threshold_decay

    def _update(self, buffer: Tensor, sums: Tensor) -> None:
        move(buffer, sums, decay=self._decay)


class ExpertBiases(_BufferUpdates):
    """Moves the biases of token choice towards equal loads.

    Tensor-parallel ranks have seen the same tokens; so have context-parallel ones, whose loads are counted as often as
    there are ranks, for all experts alike.
    """

    def __init__(self, config: Config, groups: ProcessGroupCollection) -> None:
        super().__init__(config, groups, Loads(), "loads")
        assert config.model.experts.token_choice is not None
        self._rate = config.model.experts.token_choice.bias_rate

    def _update(self, buffer: Tensor, sums: Tensor) -> None:
        balance(buffer, sums, rate=self._rate)


def observers_of(
    config: Config, transformer: TransformerConfig, chunks: Sequence[Any], groups: ProcessGroupCollection
) -> list[StepObserver]:
    """The observers that a configuration requests.

    Call it after the main model's buffers and optimizer are created.
    """
    found: list[StepObserver] = []
    if config.model.auxiliary.mode == "joint":
        found.append(JointRouters(config, AuxiliaryTrainer(config, transformer, chunks, groups)))
    if config.model.keeps_thresholds:
        found.append(ThresholdAverages(config, groups))
    if config.model.has_experts and config.model.experts.token_choice is not None:
        found.append(ExpertBiases(config, groups))
    if (weights := loss_weights_of(config, groups)) is not None:
        found.append(weights)
    if scales := scales_of(chunks):
        found.append(DelayedScaling(scales, groups))
    if config.precision.emulated and config.precision.fp8 == "nvfp4" and config.precision.fp4_stochastic_rounding:
        found.append(RoundingSteps(chunks, per_step=config.train.global_batch_size // config.train.micro_batch_size))
    return found


def loss_weights_among(observers: Sequence[StepObserver]) -> LossWeights | None:
    """The weights of documents, whose averages are part of checkpoints; None: there are none."""
    return next((observer for observer in observers if isinstance(observer, LossWeights)), None)


def routers_among(observers: Sequence[StepObserver]) -> AuxiliaryTrainer | None:
    """The trainer of a joint run's routers, whose optimizer is part of checkpoints; None: there is none."""
    return next((observer.trainer for observer in observers if isinstance(observer, JointRouters)), None)
