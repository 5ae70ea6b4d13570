"""The state of a main run: weights, optimizer state and counters, and how checkpoints store them.

It converts these to a sharded state dict and back; mmscale.checkpoint decides where and when they are written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from mmscale.checkpoint.sharded import metadata
from mmscale.checkpoint.tensors import TensorEntry
from mmscale.model.state_te import scaled_modules
from mmscale.train.optim.optimizer import load_optimizer
from mmscale.train.optim.shards import expect
from mmscale.train.stage_state import Counters
from mmscale.train.steps import fp8_scales
from mmscale.train.steps.auxiliary_routers import AuxiliaryTrainer
from mmscale.train.steps.loss_weights import LossWeights

_AVERAGES = "loss_weights"


@dataclass
class TrainState(Counters):
    """The state of a main run on this rank.

    Attributes:
        chunks: model chunks of this rank, wrapped.
        optimizer: megatron's optimizer over them; None if only weights are needed (evaluation).
        routers: the trainer of a joint run's auxiliary routers; their weights are in the chunks, their optimizer here.
        loss_weights: the weights of documents; their averages are among the counters.
    """

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer | None
    routers: AuxiliaryTrainer | None = None
    loss_weights: LossWeights | None = None

    def progress(self) -> dict[str, Any]:
        """As in the base class; with the averages of loss-based weights."""
        averages = {} if self.loss_weights is None else {_AVERAGES: self.loss_weights.plain()}
        return super().progress() | averages

    def restore_progress(self, plain: Mapping[str, Any]) -> None:
        """As in the base class. Averages that were not kept begin again at 0; unused ones are dropped."""
        counters = dict(plain)
        averages = counters.pop(_AVERAGES, None)
        super().restore_progress(counters)
        if self.loss_weights is not None:
            self.loss_weights.restore(averages)

    def sharded(self, *, loading: bool) -> dict[str, Any]:
        """The sharded state dict of this rank: tensors as ShardedTensors with global keys, counters as they are."""
        models = self.sharded_weights()
        state: dict[str, Any] = dict(models)
        if self.optimizer is not None:
            state["optimizer"] = self.optimizer.sharded_state_dict(models, is_loading=loading, metadata=metadata())
        if self.routers is not None:
            state["auxiliary_optimizer"] = self.routers.sharded(models, loading=loading, metadata=metadata())
        if scales := fp8_scales.sharded(self.chunks):
            state["fp8"] = scales
        if not loading:
            state["progress"] = self.progress()
        return state

    def expect(self, stored: Mapping[str, TensorEntry]) -> None:
        """Set the tensors of the checkpoint that is going to be read, whose moments may have another format."""
        for optimizer in self.optimizers():
            expect(optimizer, stored)

    def sharded_weights(self) -> dict[str, Any]:
        """The model's part of the sharded state dict."""
        models: dict[str, Any] = {}
        for index, chunk in enumerate(self.chunks):
            key = "model" if len(self.chunks) == 1 else f"model{index}"
            # Unwrapped, because DDP and Float16Module would put "module." before every key, depending on the dtype.
            models[key] = unwrapped(chunk).sharded_state_dict(metadata=metadata())
        return models

    def take_weights(self, loaded: dict[str, Any]) -> None:
        """Take over the weights of another run, as read for `sharded_weights`; the rest of the state is not changed."""
        self._load_weights(loaded)
        for optimizer in self.optimizers():
            optimizer.reload_model_params()

    def _load_weights(self, loaded: dict[str, Any]) -> None:
        for index, chunk in enumerate(self.chunks):
            unwrapped(chunk).load_state_dict(loaded["model" if len(self.chunks) == 1 else f"model{index}"])

    def restore(self, loaded: dict[str, Any]) -> None:
        """Restore the result of `checkpoint.sharded.read`."""
        self._load_weights(loaded)
        if self.optimizer is not None:
            _take_over(self.optimizer, loaded.get("optimizer"))
        if self.routers is not None:
            _take_over(self.routers.optimizer, loaded.get("auxiliary_optimizer"))
        fp8_scales.restore(self.chunks, loaded.get("fp8", {}))
        self.restore_progress(loaded["progress"])

    def optimizers(self) -> list[MegatronOptimizer]:
        """The model's optimizer, and that of a joint run's routers."""
        found = [self.optimizer, None if self.routers is None else self.routers.optimizer]
        return [optimizer for optimizer in found if optimizer is not None]

    def local_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Buffers, and frozen parameters."""
        for index, chunk in enumerate(self.chunks):
            module = unwrapped(chunk)
            yield from ((f"model.{index}.{name}", buffer) for name, buffer in module.named_buffers())
            for name, param in module.named_parameters():
                if not param.requires_grad:
                    yield f"model.{index}.{name}", param.data

    def scaled(self) -> Iterator[tuple[str, Any]]:
        """Modules with delayed FP8 scales, by name; emulated FP8 keeps its scales in buffers."""
        for index, chunk in enumerate(self.chunks):
            yield from ((f"fp8.{index}.{name}", module) for name, module in scaled_modules(unwrapped(chunk)))

    def gather(self) -> None:
        """Gather the parameters of all chunks, and of a joint run's routers."""
        for chunk in self.chunks:
            chunk.start_param_sync(force_sync=True)
        if self.routers is not None:
            self.routers.module.start_param_sync(force_sync=True)


def _take_over(optimizer: MegatronOptimizer, loaded: dict[str, Any] | None) -> None:
    """Load the optimizer's state. For a checkpoint of weights only, set the fp32 parameters to the model's."""
    if loaded is None:
        optimizer.reload_model_params()
    else:
        load_optimizer(optimizer, loaded)


def unwrapped(module: torch.nn.Module) -> Any:
    """The GPTModel inside DDP and Float16Module."""
    while isinstance(module, DistributedDataParallel | Float16Module):
        module = module.module
    return module
