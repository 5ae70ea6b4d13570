"""Floating-point operations per token: matrix products, causal attention and the output layer.

Element-wise operations are not counted, as is usual. By this count, MoMa's models have matching FLOPs: dense and
Mixture-of-Depths models of a class in Table 1 (arXiv 2407.21770) are within 3 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mmscale.config import Config
from mmscale.config.derived import (
    depth_tokens,
    expert_capacity,
    expert_counts,
    on_fullest_rank,
    slots_of_token,
    ungated_groups,
)
from mmscale.config.precision.fp8 import capacity_multiple
from mmscale.layers import LayerTensor, TensorPart, layer_tensors
from mmscale.layers.frozen import is_frozen

# Routers of all groups are one product, whose gradient is computed if any of them is trained: they are not counted.
_MATRICES = (TensorPart.ATTENTION, TensorPart.FFN, TensorPart.EXPERTS)


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs per token, averaged over a sequence.

    Attributes:
        projections: attention's projections.
        attention: scores and weighted sums, causal.
        ffn: dense networks, experts with all their slots, shared experts.
        routers: those of experts and of depth layers.
        output: the output layer.
        frozen: the products with frozen weights among them, without routers.
    """

    projections: float
    attention: float
    ffn: float
    routers: float
    output: float
    frozen: float = 0.0

    @property
    def forward(self) -> float:
        """All FLOPs of a forward pass."""
        return self.projections + self.attention + self.ffn + self.routers + self.output

    @property
    def training(self) -> float:
        """Forward and backward, which has twice the FLOPs; recomputation is not counted, as is usual for MFU.

        Backward has no products for the gradients of frozen weights.
        """
        return 3 * self.forward - self.frozen

    def as_dict(self) -> dict[str, float]:
        """Plain data for `mmscale plan --json`."""
        return {
            "forward": self.forward,
            "training": self.training,
            "projections": self.projections,
            "attention": self.attention,
            "ffn": self.ffn,
            "routers": self.routers,
            "output": self.output,
        }


def nominal_shares(config: Config) -> dict[str, float]:
    """Nominal share of each modality; equal ones if they are still to be measured (`auto`)."""
    share = config.model.experts.share
    if share == "auto":
        return {name: 1 / len(config.vocab.names) for name in config.vocab.names}
    return dict(share)


def untied_share(config: Config, tensor: LayerTensor) -> float:
    """The share of a layer's tokens that use a tensor: those of its modality if it is untied, otherwise all."""
    return nominal_shares(config)[str(tensor.modality)] if tensor.untied else 1.0


def expert_slots(config: Config, tokens: int) -> dict[str, float]:
    """Expert slots per token that a layer computes, for each group; their sum is about the capacity factor.

    With `model.experts.capacity = actual` these are the slots for a micro-batch with nominal shares. With other shares
    the slots of groups differ, and their sum is about the same; with expert parallelism it is that of the fullest rank.
    Token choice without a limit is counted with equal loads and nominal shares: an expert that gets more than the mean
    raises the slots of all experts of its group to its own.

    Args:
        config: a configuration with experts.
        tokens: tokens of each sequence that the layer processes (fewer in a Mixture-of-Depths layer).
    """
    experts = config.model.experts
    whole = experts.scope == "micro_batch" or not config.model.limits_experts
    scope = tokens * (config.train.micro_batch_size if whole else 1)
    shares = _group_shares(config, tokens, actual=experts.capacity == "actual")
    slots = {}
    for name, count in expert_counts(config).items():
        capacity = expert_capacity(
            scope,
            shares[name],
            count,
            factor=slots_of_token(config),
            multiple=capacity_multiple(config),
            limit=scope if experts.capacity == "nominal" else max(1, round(shares[name] * scope)),
        )
        slots[name] = count * capacity / scope
    return slots


def ungated_slots(config: Config, tokens: int) -> dict[str, float]:
    """Slots per token of each ungated group: its tokens, rounded up. Arguments as for `expert_slots`.

    In a Mixture-of-Depths layer there are slots for the largest possible number of its tokens.
    """
    shares, multiple = _group_shares(config, tokens, actual=True), capacity_multiple(config)
    scope = tokens * config.train.micro_batch_size
    return {
        group.name: math.ceil(max(1, round(shares[group.name] * scope)) / multiple) * multiple / scope
        for group in ungated_groups(config)
    }


def _group_shares(config: Config, tokens: int, *, actual: bool) -> dict[str, float]:
    """Share of each group in the tokens that a layer processes, which determines its slots.

    If slots follow the `actual` tokens, a Mixture-of-Depths layer has slots for the largest possible number of tokens
    of each group.
    """
    model = config.model
    if not model.per_modality:
        return dict.fromkeys(model.experts.counts, 1.0)
    shares = nominal_shares(config)
    if not actual or model.depth is None or tokens == model.seq_length:
        return shares
    by_quota = model.depth.choice == "per_modality"
    quotas = {name: int(share * tokens + 1e-9) if by_quota else 0 for name, share in shares.items()}
    found = {}
    for name, share in shares.items():
        others = sum(quota for other, quota in quotas.items() if other != name)
        found[name] = min(share * model.seq_length, tokens - others) / tokens
    return found


def dealt_slots(config: Config, tokens: int) -> dict[str, float]:
    """Expert slots of a context-parallel rank per token of the whole sequence, for each group.

    The slots of every expert are divided among the ranks, and padded to an equal number (mmscale.model.routing.dealt).
    Arguments as for `expert_slots`.
    """
    return _dealt(config, tokens, expert_slots(config, tokens))


def dealt_ungated_slots(config: Config, tokens: int) -> dict[str, float]:
    """As `dealt_slots`, for the ungated groups."""
    return _dealt(config, tokens, ungated_slots(config, tokens))


def _dealt(config: Config, tokens: int, slots: Mapping[str, float]) -> dict[str, float]:
    cp, counts = config.parallel.cp, config.model.experts.counts
    if cp == 1:
        return dict(slots)
    whole, parts = tokens * config.train.micro_batch_size, cp * capacity_multiple(config)
    return {
        name: counts[name] * math.ceil(round(share * whole / counts[name]) / parts) * (parts // cp) / whole
        for name, share in slots.items()
    }


def fullest_slots(config: Config, tokens: int) -> float:
    """Expert slots per token that the fullest expert-parallel rank computes, for all ranks' tokens together.

    Of each sequence a context-parallel rank sends its part of the slots. If expert parallelism divides every group, the
    result is the sum of `dealt_slots`. If ranks hold different numbers of experts it is larger, and the other ranks
    wait. Arguments as for `expert_slots`.
    """
    return config.parallel.ep * on_fullest_rank(config, dealt_slots(config, tokens))


def layer_flops(config: Config, *, depth: bool) -> Flops:
    """Forward FLOPs of one layer per token of the whole sequence; a product of [a, b] and [b, c] counts 2abc.

    Args:
        config: a configuration.
        depth: whether it is a Mixture-of-Depths layer, which processes a fraction of the tokens.
    """
    model = config.model
    tokens = depth_tokens(config) if depth else model.seq_length
    fraction = tokens / model.seq_length
    slots = expert_slots(config, tokens) if model.has_experts else {}
    ungated = ungated_slots(config, tokens)
    counts = expert_counts(config)
    frozen = 0.0
    elements = dict.fromkeys(TensorPart, 0.0)  # elements of the matrices that a token is multiplied with, by part
    for tensor in layer_tensors(config, depth=depth):
        share = untied_share(config, tensor)
        if tensor.part is TensorPart.EXPERTS and tensor.group:
            share = slots[tensor.group] / counts[tensor.group]
        elif tensor.part is TensorPart.FFN and tensor.modality in ungated:
            share = ungated[tensor.modality]
        elements[tensor.part] += share * tensor.size
        if is_frozen(config, tensor) and tensor.part in _MATRICES:
            frozen += fraction * 2 * share * tensor.size
    return Flops(
        projections=fraction * 2 * elements[TensorPart.ATTENTION],
        # Two products over the preceding tokens, on average half of the sequence.
        attention=fraction * 2 * 2 * model.num_attention_heads * model.head_dim * tokens / 2,
        ffn=fraction * 2 * sum(elements[part] for part in (TensorPart.FFN, TensorPart.EXPERTS, TensorPart.SHARED)),
        routers=fraction * 2 * elements[TensorPart.ROUTER] + 2 * elements[TensorPart.DEPTH_ROUTER],
        output=0.0,
        frozen=frozen,
    )


def flops_per_token(config: Config) -> Flops:
    """Forward FLOPs per token of the whole model."""
    model = config.model
    deep = sum(map(model.is_depth_layer, range(model.num_layers)))
    kinds = [
        (count, layer_flops(config, depth=depth))
        for depth, count in ((True, deep), (False, model.num_layers - deep))
        if count
    ]
    return Flops(
        projections=sum(count * layer.projections for count, layer in kinds),
        attention=sum(count * layer.attention for count, layer in kinds),
        ffn=sum(count * layer.ffn for count, layer in kinds),
        routers=sum(count * layer.routers for count, layer in kinds),
        output=2.0 * model.hidden_size * config.vocab.padded_size,
        frozen=sum(count * layer.frozen for count, layer in kinds),
    )
