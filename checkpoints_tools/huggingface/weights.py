"""Converts every tensor of a checkpoint to the tensors of a Hugging Face model, and back.

Names and shapes come from the table of tensors (mmscale.layers); this module rearranges values. Both directions of
every form are next to each other, so an exported tensor can be imported bit by bit. Files are read and written
elsewhere.

Letters: G key/value heads, Q query heads of each, D width of a head, H hidden width, F inner width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmscale.config import Config
from mmscale.layers import Form, Routers, TensorPart, model_tensors

Split = Callable[[Tensor], list[Tensor]]
Join = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Move:
    """The conversion of one tensor of a checkpoint.

    Attributes:
        source: the checkpoint's name.
        targets: names in the exported model.
        split: converts the checkpoint's tensor to the model's, as views if possible.
        join: the inverse.
    """

    source: str
    targets: tuple[str, ...]
    split: Split
    join: Join


def is_native(config: Config) -> bool:
    """Whether transformers has a class for this model, so that no code needs to be shipped."""
    model = config.model
    plain = not model.has_experts and model.depth is None and not model.untie and model.norm_placement.before
    return plain and not (model.qk_norm and model.qkv_bias)


def model_type(config: Config) -> str:
    """The model's type in transformers: a class of transformers, or that of the shipped code."""
    if not is_native(config):
        return "moma"
    return "qwen3" if config.model.qk_norm else "qwen2" if config.model.qkv_bias else "llama"


def moves(config: Config, *, auxiliary: bool, thresholds: bool) -> list[Move]:
    """The conversions of all tensors of a model, in the model's order.

    Args:
        config: the run's configuration.
        auxiliary: the model has auxiliary routers.
        thresholds: it keeps averaged cut-offs.
    """
    forms = _forms(config)
    return [
        Move(tensor.name, tensor.hf, *forms[tensor.form])
        for tensor in model_tensors(config, routers=Routers(0 if auxiliary else None, thresholds))
    ]


def target_shapes(
    config: Config, *, auxiliary_size: int, thresholds: bool, rows: int | None = None
) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of an exported model.

    Args:
        config: the run's configuration.
        auxiliary_size: inner width of the auxiliary routers; 0: there are none.
        thresholds: the model keeps averaged cut-offs.
        rows: of embedding and output layer; None: as in the configuration. A foreign model has fewer.
    """
    forms = _forms(config)
    found: dict[str, tuple[int, ...]] = {}
    for tensor in model_tensors(config, routers=Routers(auxiliary_size or None, thresholds)):
        per_id = tensor.part in (TensorPart.EMBEDDING, TensorPart.OUTPUT)
        shape = (rows, *tensor.shape[1:]) if per_id and rows is not None else tensor.shape
        split, _ = forms[tensor.form]
        parts = split(torch.empty(shape, device="meta"))
        found |= {name: tuple(part.shape) for name, part in zip(tensor.hf, parts, strict=True)}
    return found


def _forms(config: Config) -> Mapping[Form, tuple[Split, Join]]:
    """Both directions of every form."""
    return {
        Form.SAME: (lambda t: [t], lambda t: t[0]),
        Form.QKV: _qkv(config.model.query_groups, config.model.head_dim),
        Form.HALVES: (lambda t: list(t.chunk(2)), lambda t: torch.cat(list(t))),
        Form.JOINED: (lambda t: [t.flatten(2)], lambda t: t[0].unflatten(2, (2, -1))),
        Form.ONE_JOINED: (
            lambda t: [t.flatten(2).squeeze(0)],
            lambda t: t[0].unsqueeze(0).unflatten(2, (2, -1)),
        ),
        Form.ONE: (lambda t: [t.squeeze(0)], lambda t: t[0].unsqueeze(0)),
    }


def _qkv(groups: int, width: int) -> tuple[Split, Join]:
    """linear_qkv holds, for each key/value head, its query heads, then the key head, then the value head."""

    def split(fused: Tensor) -> list[Tensor]:
        inner = fused.shape[1:]  # [H]; empty for a bias
        heads = fused.view(groups, -1, width, *inner)  # [G, Q + 2, D, H]
        parts = heads[:, :-2], heads[:, -2:-1], heads[:, -1:]
        return [part.reshape(-1, *inner) for part in parts]

    def join(parts: Sequence[Tensor]) -> Tensor:
        inner = parts[0].shape[1:]
        return torch.cat([part.view(groups, -1, width, *inner) for part in parts], dim=1).reshape(-1, *inner)

    return split, join
