"""Freezes the parameters that `optim.freeze` names, before gradient buffers and optimizers are made.

Both skip parameters without `requires_grad`, so that a frozen parameter has no gradient, no optimizer state, no weight
decay and no communication. A checkpoint stores it with the model's weights.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from mmscale.config import Config
from mmscale.layers import TensorPart, layer_tensors
from mmscale.layers.frozen import is_frozen
from mmscale.layers.whole import final_norm

_IN_LAYER = re.compile(r"decoder\.layers\.\d+\.(.+)")


def freeze(config: Config, chunks: Sequence[nn.Module]) -> list[str]:
    """Freeze this rank's part of the named weights; returns the names of the parameters, chunk by chunk.

    Args:
        config: `optim.freeze` and the model.
        chunks: the model's chunks, not wrapped yet.
    """
    if not config.optim.freeze:
        return []
    tensors = [tensor for tensor in layer_tensors(config, depth=False) if is_frozen(config, tensor)]
    names = {tensor.name for tensor in tensors}
    last = {tensor.name for tensor in final_norm(config) if is_frozen(config, tensor)}
    # Modules of experts name their own weights: Transformer-Engine's has a list of them.
    modules = tuple(f"mlp.experts.{group}." for group in frozen_groups(config))
    modules += tuple(tensor.name.removesuffix("w1") for tensor in tensors if tensor.name.startswith("mlp.ungated."))
    frozen = []
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            found = _IN_LAYER.fullmatch(name)
            if name in last or (found is not None and (found[1] in names or found[1].startswith(modules))):
                parameter.requires_grad_(False)
                frozen.append(name)
    return frozen


def frozen_groups(config: Config) -> frozenset[str]:
    """Groups of experts that are frozen: their biases and averaged cut-offs must not move either."""
    tensors = layer_tensors(config, depth=False)
    own = (tensor for tensor in tensors if tensor.part is TensorPart.EXPERTS and is_frozen(config, tensor))
    return frozenset(str(tensor.group) for tensor in own)
