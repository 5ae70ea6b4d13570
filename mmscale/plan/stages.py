"""Layers and parameters of each pipeline stage. Interleaved chunks are assigned round-robin.

Bytes per element are here too, because all other counts use them.
"""

from __future__ import annotations

from mmscale.config import Config
from mmscale.config.derived import chunk_layers, on_fullest_rank
from mmscale.plan.parameters import Parameters


def rank_tokens(config: Config) -> float:
    """Tokens of a micro-batch that a context-parallel rank has."""
    return config.train.micro_batch_size * config.model.seq_length / config.parallel.cp


def dtype_bytes(config: Config) -> int:
    """Bytes of a parameter or an activation."""
    return 2 if config.precision.dtype == "bf16" else 4


def stage_layers(config: Config, stage: int) -> list[int]:
    """Global indices of the layers of a pipeline stage; interleaved chunks are assigned round-robin."""
    return [layer for chunk in chunk_layers(config)[stage :: config.parallel.pp] for layer in chunk]


def first_and_last(config: Config, stage: int) -> tuple[bool, bool]:
    """Whether a stage holds the embedding, and whether it holds the output layer."""
    return stage == 0, stage == config.parallel.pp - 1


def stage_parameters(config: Config, parameters: Parameters, stage: int) -> tuple[float, float]:
    """Parameters on the fullest rank of this stage: (dense ones, experts)."""
    tp = config.parallel.tp
    first, last = first_and_last(config, stage)
    dense, experts = 0.0, 0.0
    indices = stage_layers(config, stage)
    for index in indices:
        layer = parameters.layers[index]
        dense += layer.sharded_by_tp / tp + layer.replicated
    if indices and (of_groups := parameters.layers[indices[0]].experts):  # all layers have the same experts
        experts = len(indices) * on_fullest_rank(config, of_groups) / tp
    if first:
        dense += parameters.embedding / tp
    if last:
        # A tied output layer on another stage than the embedding is a copy of the embedding.
        copy = parameters.embedding if config.model.tie_embeddings and not first else parameters.output
        dense += copy / tp + parameters.final_norms
    return dense, experts
