"""What a run is made of and what a checkpoint keeps of it: weights, optimizer state, steps and sequences consumed.

It knows how these become a sharded state dict and back; where and when they are written is checkpoint/'s business.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.transformer.module import Float16Module

from mmscale.checkpoint.sharded import metadata
from mmscale.config import Config
from mmscale.errors import CheckpointError


@dataclass
class TrainState:
    """The state of a run on this rank.

    Attributes:
        chunks: model chunks of this rank, wrapped.
        optimizer: megatron's optimizer over them; None if only weights are wanted (evaluation).
        step: optimizer steps done.
        sequences: sequences consumed, over all ranks.
        tokens: tokens consumed, padding not counted.
        modality_tokens: the same by modality.
    """

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer | None
    step: int = 0
    sequences: int = 0
    tokens: int = 0
    modality_tokens: dict[str, int] = field(default_factory=dict)

    def sharded(self, *, loading: bool) -> dict[str, Any]:
        """The sharded state dict of this rank: tensors as ShardedTensors with global keys, counters as they are."""
        models: dict[str, Any] = {}
        for index, chunk in enumerate(self.chunks):
            key = "model" if len(self.chunks) == 1 else f"model{index}"
            # The model itself: DDP and Float16Module would put "module." before every key, differently for each dtype.
            models[key] = unwrapped(chunk).sharded_state_dict(metadata=metadata())
        state: dict[str, Any] = dict(models)
        if self.optimizer is not None:
            state["optimizer"] = self.optimizer.sharded_state_dict(models, is_loading=loading, metadata=metadata())
        if not loading:
            state["progress"] = self.progress()
        return state

    def progress(self) -> dict[str, Any]:
        """The counters, as plain data."""
        return {
            "step": self.step,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "modality_tokens": dict(self.modality_tokens),
        }

    def restore(self, loaded: dict[str, Any]) -> None:
        """Take over what `checkpoint.sharded.read` gave."""
        for index, chunk in enumerate(self.chunks):
            unwrapped(chunk).load_state_dict(loaded["model" if len(self.chunks) == 1 else f"model{index}"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(loaded["optimizer"])
        for name, value in loaded["progress"].items():
            setattr(self, name, value)


def unwrapped(module: torch.nn.Module) -> Any:
    """The GPTModel inside DDP and Float16Module."""
    while isinstance(module, DistributedDataParallel | Float16Module):
        module = module.module
    return module


def shape_of(config: Config) -> dict[str, Any]:
    """The settings that a checkpoint's tensors depend on, by dotted key."""
    model, vocab = config.model, config.vocab
    shape: dict[str, Any] = {
        f"model.{name}": getattr(model, name)
        for name in (
            "kind",
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "norm",
            "qk_norm",
            "tie_embeddings",
        )
    }
    shape["model.num_query_groups"] = model.query_groups
    shape["model.kv_channels"] = model.head_dim
    shape["model.experts.counts"] = dict(sorted(model.experts.counts.items()))
    shape["model.experts.shared"] = model.experts.shared
    shape["model.experts.shared_ffn_hidden_size"] = model.experts.shared_ffn_hidden_size
    shape["model.depth.every"] = model.depth.every if model.depth else None
    shape["vocab.modalities"] = [[modality.name, modality.size] for modality in vocab.modalities]
    shape["vocab.pad_multiple"] = vocab.pad_multiple
    return shape


def check_shape(config: Config, saved: dict[str, Any], *, where: str) -> None:
    """Refuse a checkpoint of another model before anything is read.

    Args:
        config: this run's configuration.
        saved: what `shape_of` gave when the checkpoint was written.
        where: name of the checkpoint, for the message.

    Raises:
        CheckpointError: the shapes differ; names every differing setting.
    """
    mine = shape_of(config)
    differing = [f"{key} was {saved.get(key)}, is {mine[key]}" for key in mine if saved.get(key) != mine[key]]
    if differing:
        raise CheckpointError(
            f"{where} holds another model: {'; '.join(differing)}",
            remedy="restore these settings, or start a new run with another run.name",
        )
