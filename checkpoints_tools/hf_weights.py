"""Which tensor of a checkpoint becomes which tensors of a Hugging Face model, and back.

Both directions of every move stand side by side, so a tensor that goes out comes back bit by bit. Files are read and
written elsewhere; here are names and shapes only.

Letters: G key/value heads, Q query heads of each, D width of a head, H hidden width, F inner width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmscale.config import Config

Split = Callable[[Tensor], list[Tensor]]
Join = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Move:
    """One tensor of a checkpoint and what becomes of it.

    Attributes:
        source: the checkpoint's name.
        targets: names in the exported model.
        split: the checkpoint's tensor as the model's, views where that is possible.
        join: the inverse.
    """

    source: str
    targets: tuple[str, ...]
    split: Split
    join: Join


def is_native(config: Config) -> bool:
    """Whether transformers has a class for this model, so that no code needs to be shipped."""
    return config.model.kind == "dense" and config.model.depth is None and config.model.norm == "pre"


def moves(config: Config, *, auxiliary: bool, thresholds: bool) -> list[Move]:
    """The moves of all tensors of a model, in the model's order.

    Args:
        config: the run's configuration.
        auxiliary: the model has auxiliary routers.
        thresholds: it keeps averaged cut-offs.
    """
    found = [_same("embedding.word_embeddings.weight", "model.embed_tokens.weight")]
    for number in range(config.model.num_layers):
        found += _layer(config, number, auxiliary=auxiliary, thresholds=thresholds)
    found.append(_same("decoder.final_layernorm.weight", "model.norm.weight"))
    if not config.model.tie_embeddings:
        found.append(_same("output_layer.weight", "lm_head.weight"))
    return found


def _layer(config: Config, number: int, *, auxiliary: bool, thresholds: bool) -> Iterator[Move]:
    model = config.model
    source, target = f"decoder.layers.{number}.", f"model.layers.{number}."
    attention = f"{target}self_attn."
    projections = tuple(f"{attention}{name}_proj.weight" for name in "qkv")
    yield _qkv(f"{source}self_attention.linear_qkv.weight", projections, model.query_groups, model.head_dim)
    yield _same(f"{source}self_attention.linear_proj.weight", f"{attention}o_proj.weight")
    if model.qk_norm:
        for name in "qk":
            yield _same(f"{source}self_attention.{name}_layernorm.weight", f"{attention}{name}_norm.weight")
    if model.norm == "pre":
        yield _same(f"{source}input_layernorm.weight", f"{target}input_layernorm.weight")
        yield _same(f"{source}pre_mlp_layernorm.weight", f"{target}post_attention_layernorm.weight")
    else:
        yield _same(f"{source}self_attn_bda.norm.weight", f"{target}attention_output_norm.weight")
        if model.norm == "post" or model.kind == "dense":
            yield _same(f"{source}mlp_bda.norm.weight", f"{target}mlp_output_norm.weight")
    if model.kind == "dense":
        halves = tuple(f"{target}mlp.{name}_proj.weight" for name in ("gate", "up"))
        yield Move(f"{source}mlp.linear_fc1.weight", halves, lambda t: list(t.chunk(2)), lambda t: torch.cat(list(t)))
        yield _same(f"{source}mlp.linear_fc2.weight", f"{target}mlp.down_proj.weight")
    else:
        yield from _experts(config, f"{source}mlp.", f"{target}mlp.", auxiliary=auxiliary, thresholds=thresholds)
    if model.is_depth_layer(number):
        yield _same(f"{source}depth_router", f"{target}depth_router")
        if auxiliary:
            yield from _auxiliary(f"{source}depth_auxiliary.", f"{target}depth_auxiliary.")
        if thresholds:
            yield _same(f"{source}depth_threshold.logit", f"{target}depth_threshold")


def _experts(config: Config, source: str, target: str, *, auxiliary: bool, thresholds: bool) -> Iterator[Move]:
    own_norm = config.model.norm == "post_per_expert"
    for group in config.model.experts.counts:
        into = f"{target}experts.{group}."
        yield _same(f"{source}router.{group}", f"{into}router")
        yield Move(f"{source}experts.{group}.w1", (f"{into}gate_up_proj",), _joined, _halved)
        yield _same(f"{source}experts.{group}.w2", f"{into}down_proj")
        if own_norm:
            yield _same(f"{source}expert_norm.{group}.weight", f"{into}norm.weight")
        if auxiliary:
            yield from _auxiliary(f"{source}auxiliary.{group}.", f"{into}auxiliary.")
        if thresholds:
            yield _same(f"{source}threshold.{group}", f"{into}threshold")
    if config.model.experts.shared:
        w1, w2 = (f"{target}shared.{name}_proj" for name in ("gate_up", "down"))
        yield Move(
            f"{source}shared.w1", (w1,), lambda t: [_joined(t)[0].squeeze(0)], lambda t: _halved([t[0].unsqueeze(0)])
        )
        yield Move(f"{source}shared.w2", (w2,), lambda t: [t.squeeze(0)], lambda t: t[0].unsqueeze(0))
        if own_norm:
            yield _same(f"{source}shared_norm.weight", f"{target}shared.norm.weight")


def _auxiliary(source: str, target: str) -> Iterator[Move]:
    for name in ("hidden", "out", "threshold"):
        yield _same(source + name, target + name)


def _same(source: str, target: str) -> Move:
    return Move(source, (target,), lambda t: [t], lambda t: t[0])


def _qkv(source: str, targets: tuple[str, ...], groups: int, width: int) -> Move:
    """linear_qkv holds, for each key/value head, its query heads, then the key head, then the value head."""

    def split(fused: Tensor) -> list[Tensor]:
        heads = fused.view(groups, -1, width, fused.shape[-1])  # [G, Q + 2, D, H]
        parts = heads[:, :-2], heads[:, -2:-1], heads[:, -1:]
        return [part.reshape(-1, fused.shape[-1]) for part in parts]

    def join(parts: Sequence[Tensor]) -> Tensor:
        hidden = parts[0].shape[-1]
        return torch.cat([part.view(groups, -1, width, hidden) for part in parts], dim=1).reshape(-1, hidden)

    return Move(source, targets, split, join)


def _joined(w1: Tensor) -> list[Tensor]:
    """[E, H, 2, F] -> [E, H, 2F]."""
    return [w1.flatten(2)]


def _halved(parts: Sequence[Tensor]) -> Tensor:
    """[E, H, 2F] -> [E, H, 2, F]."""
    (joined,) = parts
    return joined.unflatten(2, (2, -1))
