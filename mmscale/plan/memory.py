"""Peak memory of a rank: states, activations, logits, temporary tensors, communication buffers.

Only tensors are counted. `USABLE` in layouts.py leaves room for fragmentation and the device's context.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmscale.config import Config
from mmscale.config.derived import dense_replicas, micro_batches_per_step, sends_keys_around
from mmscale.plan.activations import (
    Kernels,
    expert_choice,
    layer_activations,
    output_activations,
    recomputed_input,
    recomputed_modules,
    shared_mask,
    total,
)
from mmscale.plan.compute import dealt_slots, fullest_slots
from mmscale.plan.muon_cost import matrix_parameters, muon_cost
from mmscale.plan.parameters import Parameters, count_parameters, trained
from mmscale.plan.stages import dtype_bytes, first_and_last, rank_tokens, stage_layers, stage_parameters
from mmscale.tables.settings import MOMENTS

GIB = 2**30
# Gradients are accumulated and reduced in fp32 whatever the parameters' type.
_GRADIENT_BYTES = 4
_MAIN_COPY_BYTES = 4
_FP32 = 4


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the fullest rank.

    Attributes:
        parameters: weights.
        gradients: fp32 gradient buffers.
        optimizer: moments and, for bf16 weights, fp32 copies; sharded over context- and data-parallel ranks.
        activations: tensors kept for backward of the micro-batches in flight, without logits.
        expert_choice: the part of `activations` for choosing and combining.
        depth: the part of `activations` for the selection and update of Mixture-of-Depths.
        logits: peak of final norm, output layer and loss, on the last stage.
        working: temporary tensors of a layer's backward, including a recomputed layer. They do not exist at the same
            time as logits, so the total includes the larger of the two.
        communication: tensors that collectives read or write.
        update: temporary tensors of Muon's update, when there are no activations.
        stage: pipeline stage of that rank.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    expert_choice: float
    depth: float
    logits: float
    working: float
    communication: float
    update: float
    stage: int

    @property
    def states(self) -> float:
        """Memory between two steps [bytes]."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """Peak memory [bytes]."""
        forward_backward = self.activations + max(self.logits, self.working)
        return self.states + max(forward_backward, self.update) + self.communication

    def as_dict(self) -> dict[str, float | int]:
        """Plain data in GiB."""
        parts = (
            "parameters",
            "gradients",
            "optimizer",
            "activations",
            "expert_choice",
            "depth",
            "logits",
            "working",
            "communication",
            "update",
            "total",
        )
        gib = {f"{part}_gib": round(getattr(self, part) / GIB, 6) for part in parts}
        return gib | {"stage": self.stage}


def checkpoint_bytes(config: Config, parameters: Parameters) -> float:
    """Bytes of a checkpoint: weights, their fp32 main copies and the optimizer's moments."""
    both = MOMENTS[config.optim.moments].bytes
    weights = parameters.total * (dtype_bytes(config) + _MAIN_COPY_BYTES)
    return weights + both * (parameters.total - matrix_parameters(config, parameters) / 2)


def rank_memory(config: Config, world: int, *, kernels: Kernels = Kernels.CUDA) -> RankMemory:
    """Memory of the fullest rank of `world` ranks."""
    ranks = stages_memory(config, world, kernels=kernels)
    return max(ranks, key=lambda rank: rank.total)


def stages_memory(
    config: Config, world: int, *, kernels: Kernels = Kernels.CUDA, parameters: Parameters | None = None
) -> list[RankMemory]:
    """Memory of a rank of every pipeline stage.

    Args:
        config: a configuration that passes the rules for `world` ranks.
        world: ranks.
        kernels: implementation of layers.
        parameters: result of `count_parameters`, if it is available.
    """
    parameters = parameters or count_parameters(config)
    updated = trained(config, parameters)
    replicas = dense_replicas(config, world)
    micro_batches = micro_batches_per_step(config, world)
    main_copy = _MAIN_COPY_BYTES if config.precision.dtype == "bf16" else 0
    # There are at most two kinds of layers: with and without Mixture-of-Depths.
    kinds = {config.model.is_depth_layer(layer): layer for layer in reversed(range(config.model.num_layers))}
    full, again = config.parallel.recompute == "full", recomputed_modules(config)
    whole = {kind: total(layer_activations(config, layer, kernels=kernels)) for kind, layer in kinds.items()}
    parts = {kind: layer_activations(config, layer, kernels=kernels, again=again) for kind, layer in kinds.items()}
    if full:
        parts = {kind: {"input": recomputed_input(config)} for kind in kinds}
    by_kind = {kind: total(kept) for kind, kept in parts.items()}
    ranks = []
    for stage in range(config.parallel.pp):
        dense, experts = stage_parameters(config, parameters, stage)
        own, own_experts = stage_parameters(config, updated, stage)
        sharded = own / replicas + own_experts / max(1, replicas // config.parallel.ep)
        muon = muon_cost(config, updated, stage=stage, world=world)
        layers = [config.model.is_depth_layer(layer) for layer in stage_layers(config, stage)]
        last = first_and_last(config, stage)[1]
        held = in_flight(config, stage, micro_batches)
        activations = held * sum(by_kind[kind] for kind in layers) + shared_mask(config, kernels=kernels)
        # A completely recomputed layer has a copy of its input; recomputed parts are added to the kept tensors.
        working = _temporary(config) + max(whole[kind] - (0.0 if full else by_kind[kind]) for kind in layers)
        ranks.append(
            RankMemory(
                parameters=(dense + experts) * dtype_bytes(config),
                gradients=(own + own_experts) * _GRADIENT_BYTES,
                optimizer=sharded * main_copy + (sharded - muon.shard / 2) * MOMENTS[config.optim.moments].bytes,
                activations=activations,
                expert_choice=held * sum(expert_choice(parts[kind]) for kind in layers),
                depth=held * sum(parts[kind].get("depth", 0.0) for kind in layers),
                logits=logits_bytes(config) + output_activations(config, kernels=kernels) if last else 0.0,
                working=working,
                communication=_communication(config),
                update=muon.temporary,
                stage=stage,
            )
        )
    return ranks


def kept_for_backward(config: Config, *, kernels: Kernels = Kernels.CUDA) -> float:
    """Largest memory that autograd keeps at one time for one micro-batch of the whole model on one process [bytes]."""
    again = recomputed_modules(config)
    indices = range(config.model.num_layers)
    layers = [total(layer_activations(config, index, kernels=kernels, again=again)) for index in indices]
    loss = (
        _hidden_copy(config) if config.parallel.loss_chunk else rank_tokens(config) * config.vocab.padded_size * _FP32
    )
    softmax = loss + output_activations(config, kernels=kernels)
    shared = shared_mask(config, kernels=kernels)
    if config.parallel.recompute == "full":
        return shared + recomputed_input(config) * len(layers) + max(softmax, *layers)
    if again:
        whole = (total(layer_activations(config, index, kernels=kernels)) for index in indices)
        return shared + sum(layers) + max(softmax, *(one - kept for one, kept in zip(whole, layers, strict=True)))
    return shared + sum(layers) + softmax


def in_flight(config: Config, stage: int, micro_batches: int) -> float:
    """Number of micro-batches whose activations a stage holds at once; may be fractional with interleaved chunks."""
    pp, chunks = config.parallel.pp, config.parallel.vpp or 1
    if chunks == 1:
        return min(pp - stage, micro_batches)
    warm_up = (pp - stage - 1) * 2 + (chunks - 1) * pp + 1
    return min(warm_up, micro_batches * chunks) / chunks


def logits_bytes(config: Config) -> float:
    """Bytes of output layer and loss: fp32 logits and their softmax.

    Backward needs less, unless the layer is wide: the gradient of the logits in the model's format, and the weight's.
    """
    rows = config.vocab.padded_size / config.parallel.tp
    size = dtype_bytes(config)
    if config.parallel.loss_chunk:
        return _chunked_bytes(config, rows)
    backward = (rank_tokens(config) + config.model.hidden_size) * rows * size
    return max(rank_tokens(config) * rows * 2 * _FP32, backward)


def _chunked_bytes(config: Config, rows: float) -> float:
    """The same for a loss in chunks: backward holds one chunk's gradient, and those of weight and hidden states.

    In bf16 a chunk's part of the weight's gradient is added to an fp32 sum, and its logits exist in both formats.
    """
    size, hidden = dtype_bytes(config), config.model.hidden_size
    chunk = min(config.parallel.loss_chunk, rank_tokens(config))
    kept = _hidden_copy(config) + (rank_tokens(config) + rows) * hidden * _FP32
    if config.precision.dtype == "fp32":
        return kept + chunk * rows * _FP32
    return kept + max(chunk * rows * (_FP32 + size), (chunk + hidden) * rows * size)


def _hidden_copy(config: Config) -> float:
    """Bytes of the output layer's input as kept by a loss in chunks: all of it, and in fp32 from a model in bf16."""
    gathered = dtype_bytes(config) if config.parallel.tp > 1 else 0
    return rank_tokens(config) * config.model.hidden_size * (_FP32 + gathered)


def _temporary(config: Config) -> float:
    """Bytes of gradients in one layer's backward, which frees them gradually: four fp32 hidden states (measured)."""
    return 4 * rank_tokens(config) * config.model.hidden_size * _FP32 / config.parallel.tp


def _communication(config: Config) -> float:
    """Bytes of gathered or passed on parts of sequences, exchanged tokens and received hidden states."""
    model, parallel, size = config.model, config.parallel, dtype_bytes(config)
    hidden = rank_tokens(config) * model.hidden_size * size
    whole = hidden * parallel.cp
    found = 2 * hidden if parallel.tp > 1 else 0.0  # gathered input; the gradient before it is scattered
    if parallel.cp > 1 and (model.has_experts or model.depth is not None):
        # Hidden states of the sequence as received and in order; the sum of the experts' outputs and the part that is
        # sent.
        found += 2 * whole + whole * (_FP32 + size) / size
    if sends_keys_around(config):
        # Keys and values of every rank and the output of every step, until forward of the layer ends.
        width = (model.num_attention_heads + 2 * max(model.query_groups, parallel.tp)) * model.head_dim
        found += rank_tokens(config) * parallel.cp * width * size / parallel.tp
    if parallel.ep > 1:
        sent = sum(dealt_slots(config, model.seq_length).values())
        found += whole * (sent + fullest_slots(config, model.seq_length))  # sent and received
    if parallel.pp > 1:
        found += 2 * hidden / parallel.tp * (parallel.vpp or 1)
    return found
