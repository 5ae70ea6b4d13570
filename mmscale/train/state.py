"""What a run is made of and what a checkpoint keeps of it: weights, optimizer state, steps and sequences consumed.

It knows how these become a sharded state dict and back; where and when they are written is checkpoint/'s business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.transformer.module import Float16Module

from mmscale.checkpoint.sharded import metadata
from mmscale.checkpoint.tensors import TensorEntry
from mmscale.resilience.anomaly import AnomalyHistory
from mmscale.train import fp8_scales
from mmscale.train.auxiliary import AuxiliaryTrainer
from mmscale.train.optim import load_optimizer
from mmscale.train.optimizer_shards import expect


@dataclass
class TrainState:
    """The state of a run on this rank.

    Attributes:
        chunks: model chunks of this rank, wrapped.
        optimizer: megatron's optimizer over them; None if only weights are wanted (evaluation).
        step: optimizer steps done.
        sequences: sequences consumed, over all ranks, those left out too: the place in the data.
        tokens: tokens trained on, padding not counted.
        modality_tokens: the same by modality.
        routers: the trainer of a joint run's auxiliary routers; their weights are in the chunks, their optimizer here.
        anomalies: what decisions about coming steps depend on. A checkpoint from before it was kept gives an empty one.
        stream: what a sequence's number means: settings of the data's order, before and after each change of them
            (mmscale.data.segments). Empty in checkpoints from before it was kept.
    """

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer | None
    step: int = 0
    sequences: int = 0
    tokens: int = 0
    modality_tokens: dict[str, int] = field(default_factory=dict)
    anomalies: AnomalyHistory = field(default_factory=AnomalyHistory)
    routers: AuxiliaryTrainer | None = None
    stream: list[dict[str, Any]] = field(default_factory=list)

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
        """Learn which tensors the checkpoint has that is going to be read: moments may be of another type there."""
        for optimizer in (self.optimizer, None if self.routers is None else self.routers.optimizer):
            if optimizer is not None:
                expect(optimizer, stored)

    def sharded_weights(self) -> dict[str, Any]:
        """The model's part of it."""
        models: dict[str, Any] = {}
        for index, chunk in enumerate(self.chunks):
            key = "model" if len(self.chunks) == 1 else f"model{index}"
            # The model itself: DDP and Float16Module would put "module." before every key, differently for each dtype.
            models[key] = unwrapped(chunk).sharded_state_dict(metadata=metadata())
        return models

    def progress(self) -> dict[str, Any]:
        """The counters, as plain data."""
        return {
            "step": self.step,
            "sequences": self.sequences,
            "stream": self.stream,
            "tokens": self.tokens,
            "modality_tokens": dict(self.modality_tokens),
            "anomalies": self.anomalies.plain(),
        }

    def restore(self, loaded: dict[str, Any]) -> None:
        """Take over what `checkpoint.sharded.read` gave."""
        for index, chunk in enumerate(self.chunks):
            unwrapped(chunk).load_state_dict(loaded["model" if len(self.chunks) == 1 else f"model{index}"])
        if self.optimizer is not None:
            _take_over(self.optimizer, loaded.get("optimizer"))
        if self.routers is not None:
            _take_over(self.routers.optimizer, loaded.get("auxiliary_optimizer"))
        fp8_scales.restore(self.chunks, loaded.get("fp8", {}))
        self.restore_progress(loaded["progress"])

    def restore_progress(self, plain: Mapping[str, Any]) -> None:
        """Take over what `progress` gave."""
        progress = dict(plain)
        self.anomalies = AnomalyHistory.of(progress.pop("anomalies", None))
        for name, value in progress.items():
            setattr(self, name, value)


def _take_over(optimizer: MegatronOptimizer, loaded: dict[str, Any] | None) -> None:
    """What was read; without it (a checkpoint of weights only) the fp32 parameters are at least those of the model."""
    if loaded is None:
        optimizer.reload_model_params()
    else:
        load_optimizer(optimizer, loaded)


def unwrapped(module: torch.nn.Module) -> Any:
    """The GPTModel inside DDP and Float16Module."""
    while isinstance(module, DistributedDataParallel | Float16Module):
        module = module.module
    return module
