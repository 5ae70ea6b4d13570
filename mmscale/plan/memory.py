"""Memory of a rank: parameters, gradients, optimizer state and activations. An estimate to choose layouts by.

It counts what autograd keeps, not the allocator's fragments nor the buffers of communication libraries.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmscale.config import Config
from mmscale.config.derived import data_parallel_size, depth_tokens, micro_batches_per_step, shared_width
from mmscale.plan.compute import expert_slots
from mmscale.plan.parameters import count_parameters
from mmscale.plan.stages import dtype_bytes, stage_layers, stage_parameters

GIB = 2**30
# Gradients are accumulated and reduced in fp32 whatever the parameters' type.
_GRADIENT_BYTES = 4
_MOMENT_BYTES = 8
_MAIN_COPY_BYTES = 4


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the fullest rank.

    Attributes:
        parameters: weights.
        gradients: fp32 gradient buffers.
        optimizer: Adam's moments and, for bf16 weights, fp32 copies; sharded over data-parallel ranks.
        activations: what backward needs of the micro-batches in flight, logits included.
        stage: pipeline stage of that rank.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    stage: int

    @property
    def total(self) -> float:
        """All of it [bytes]."""
        return self.parameters + self.gradients + self.optimizer + self.activations

    def as_dict(self) -> dict[str, float | int]:
        """Plain data in GiB."""
        parts = ("parameters", "gradients", "optimizer", "activations", "total")
        gib = {f"{part}_gib": round(getattr(self, part) / GIB, 3) for part in parts}
        return gib | {"stage": self.stage}


def state_bytes(config: Config) -> int:
    """Bytes per parameter of a checkpoint: the weight, its fp32 main copy and two moments."""
    return dtype_bytes(config) + _MAIN_COPY_BYTES + _MOMENT_BYTES


def layer_activations(config: Config, layer: int) -> float:
    """Bytes that backward of one layer needs, for one micro-batch on one rank."""
    model, tp, size = config.model, config.parallel.tp, dtype_bytes(config)
    h, f, d = model.hidden_size, model.ffn_hidden_size, model.head_dim
    heads, groups = model.num_attention_heads, model.query_groups
    depth = model.is_depth_layer(layer)
    tokens = depth_tokens(config) if depth else model.seq_length
    # Inputs and outputs of both norms; q, k, v as projected, normalised and turned; the attention's output.
    attention = 4 * h + (heads + 2 * groups) * d + (2 if model.qk_norm else 1) * (heads + groups) * d + heads * d
    elements = attention / tp
    if model.kind == "dense":
        elements += (4 * f + h) / tp
    else:
        slots = sum(expert_slots(config, tokens).values())
        # Chosen tokens and the experts' outputs are whole on every tensor-parallel rank; the inner width is not.
        elements += slots * (2 * h + 4 * f / tp) + 4 * shared_width(config) / tp
        elements += 4 / size * h / tp  # the router reads fp32
    if depth:
        elements += 2 * h + 4 / size * h  # selected tokens and their update, whole on every rank
    return elements * size * tokens * config.train.micro_batch_size


def _in_flight(config: Config, stage: int, micro_batches: int) -> float:
    """Micro-batches whose activations a stage holds at once, in units of all of its layers."""
    pp, chunks = config.parallel.pp, config.parallel.vpp or 1
    if chunks == 1:
        return min(pp - stage, micro_batches)
    warm_up = (pp - stage - 1) * 2 + (chunks - 1) * pp + 1
    return min(warm_up, micro_batches * chunks) / chunks


def _activations(config: Config, stage: int, micro_batches: int) -> float:
    model, tp, size = config.model, config.parallel.tp, dtype_bytes(config)
    tokens = config.train.micro_batch_size * model.seq_length
    kept = [layer_activations(config, layer) for layer in stage_layers(config, stage)]
    working = 0.0
    if config.parallel.recompute == "full":
        working = max(kept)
        kept = [model.hidden_size / tp * size * tokens for _ in kept]
    total = sum(kept) * _in_flight(config, stage, micro_batches) + working
    total += tokens * model.seq_length * size  # the mask that confines attention to documents
    if stage == config.parallel.pp - 1:
        total += tokens * config.vocab.padded_size / tp * (size + 2 * 4)  # logits, in fp32, and their softmax
    return total


def rank_memory(config: Config, world: int) -> RankMemory:
    """Memory of the fullest rank of `world` ranks."""
    parameters = count_parameters(config)
    replicas = data_parallel_size(config, world)
    main_copy = _MAIN_COPY_BYTES if config.precision.dtype == "bf16" else 0
    ranks = []
    for stage in range(config.parallel.pp):
        dense, experts = stage_parameters(config, parameters, stage)
        sharded = dense / replicas + experts / max(1, replicas // config.parallel.ep)
        ranks.append(
            RankMemory(
                parameters=(dense + experts) * dtype_bytes(config),
                gradients=(dense + experts) * _GRADIENT_BYTES,
                optimizer=sharded * (_MOMENT_BYTES + main_copy),
                activations=_activations(config, stage, micro_batches_per_step(config, world)),
                stage=stage,
            )
        )
    return max(ranks, key=lambda rank: rank.total)
