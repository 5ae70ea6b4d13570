"""Tensors of the feed-forward layer, a function for each kind (`model.kind`).

A new kind is an entry in KINDS of mmscale.tables.settings, one in FEED_FORWARDS, and one in FEED_FORWARDS of
mmscale.model.spec. No other code depends on the name of a kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from mmscale.config import Config
from mmscale.config.derived import expert_groups, shared_width, ungated_groups
from mmscale.layers.layer_tensor import Form, LayerTensor, Routers, TensorPart, auxiliary_tensors, by_modality


def dense_tensors(config: Config, _: Routers) -> Iterator[LayerTensor]:
    """One SwiGLU for all tokens, or one for each modality."""
    hidden, inner = config.model.hidden_size, config.model.ffn_hidden_size
    first = LayerTensor(
        name="mlp.linear_fc1.weight",
        shape=(2 * inner, hidden),
        part=TensorPart.FFN,
        hf=tuple(f"mlp.{name}_proj.weight" for name in ("gate", "up")),
        form=Form.HALVES,
        tp_axis=0,
    )
    second = LayerTensor(
        name="mlp.linear_fc2.weight",
        shape=(hidden, inner),
        part=TensorPart.FFN,
        hf=("mlp.down_proj.weight",),
        tp_axis=1,
    )
    for tensor in (first, second):
        yield from by_modality(config, "ffn", tensor)


def expert_tensors(config: Config, routers: Routers) -> Iterator[LayerTensor]:
    """Groups of experts with their routers, and shared experts."""
    for group in expert_groups(config):
        modality = config.vocab.names[group.modalities[0]] if len(group.modalities) == 1 else None
        for tensor in _group(config, group.name, group.experts, routers):
            yield replace(tensor, group=group.name, modality=modality)
    for group in ungated_groups(config):
        for tensor in _ungated(config, group.name):
            yield replace(tensor, modality=group.name)
    if width := shared_width(config):
        yield from _shared(config, width)


def _group(config: Config, group: str, count: int, routers: Routers) -> Iterator[LayerTensor]:
    """The tensors of one group of `count` experts."""
    hidden, inner, hf = config.model.hidden_size, config.model.ffn_hidden_size, f"mlp.experts.{group}."
    yield LayerTensor(name=f"mlp.router.{group}", shape=(count, hidden), part=TensorPart.ROUTER, hf=(f"{hf}router",))
    # In w1 the gate and up projections have their own axis, of size 2.
    yield LayerTensor(
        name=f"mlp.experts.{group}.w1",
        shape=(count, hidden, 2, inner),
        part=TensorPart.EXPERTS,
        hf=(f"{hf}gate_up_proj",),
        form=Form.JOINED,
        tp_axis=3,
    )
    yield LayerTensor(
        name=f"mlp.experts.{group}.w2",
        shape=(count, inner, hidden),
        part=TensorPart.EXPERTS,
        hf=(f"{hf}down_proj",),
        tp_axis=1,
    )
    if config.model.normalizes_experts:
        yield LayerTensor(
            name=f"mlp.expert_norm.{group}.weight",
            shape=(hidden,),
            part=TensorPart.EXPERT_NORM,
            hf=(f"{hf}norm.weight",),
        )
    if config.model.experts.token_choice is not None:
        yield LayerTensor(
            name=f"mlp.router_bias.{group}", shape=(count,), part=TensorPart.BIAS, hf=(f"{hf}router_bias",)
        )
        return
    if routers.auxiliary_width is not None:
        yield from auxiliary_tensors(
            f"mlp.auxiliary.{group}.", f"{hf}auxiliary.", outputs=count, hidden=hidden, width=routers.auxiliary_width
        )
    if routers.thresholds:
        yield LayerTensor(name=f"mlp.threshold.{group}", shape=(count,), part=TensorPart.CUTOFF, hf=(f"{hf}threshold",))


def _ungated(config: Config, group: str) -> Iterator[LayerTensor]:
    """The tensors of a group of one expert without a router: those of an untied feed-forward layer."""
    hf = f"mlp.experts.{group}."
    yield from _single(config, f"mlp.ungated.{group}.", hf, config.model.ffn_hidden_size, TensorPart.FFN)
    if config.model.normalizes_experts:
        yield LayerTensor(
            name=f"mlp.expert_norm.{group}.weight",
            shape=(config.model.hidden_size,),
            part=TensorPart.NORM,
            hf=(f"{hf}norm.weight",),
        )


def _shared(config: Config, width: int) -> Iterator[LayerTensor]:
    """Shared experts, stored as one expert of their joint width."""
    yield from _single(config, "mlp.shared.", "mlp.shared.", width, TensorPart.SHARED)
    if config.model.normalizes_experts:
        yield LayerTensor(
            name="mlp.shared_norm.weight",
            shape=(config.model.hidden_size,),
            part=TensorPart.NORM,
            hf=("mlp.shared.norm.weight",),
        )


def _single(config: Config, place: str, hf: str, width: int, part: TensorPart) -> Iterator[LayerTensor]:
    """One expert of a SwiGLU width that every rank holds, with prefixes of its names in checkpoint and export."""
    hidden = config.model.hidden_size
    yield LayerTensor(
        name=f"{place}w1",
        shape=(1, hidden, 2, width),
        part=part,
        hf=(f"{hf}gate_up_proj",),
        form=Form.ONE_JOINED,
        tp_axis=3,
    )
    yield LayerTensor(
        name=f"{place}w2", shape=(1, width, hidden), part=part, hf=(f"{hf}down_proj",), form=Form.ONE, tp_axis=1
    )


FEED_FORWARDS: Mapping[str, Callable[[Config, Routers], Iterator[LayerTensor]]] = {
    "dense": dense_tensors,
    "moe": expert_tensors,
    "moma": expert_tensors,
}
