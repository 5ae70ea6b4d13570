"""The tensors of a layer that `optim.freeze` names: of one modality, or of a part of its weights."""

from __future__ import annotations

from mmscale.config import Config
from mmscale.layers.layer_tensor import LayerTensor, TensorPart

# The parts of FROZEN in mmscale.tables.settings, as parts of the table of tensors. Biases and cut-offs are buffers
# that decide about the tokens of a frozen expert.
PARTS: dict[str, frozenset[TensorPart]] = {
    "attention": frozenset({TensorPart.ATTENTION}),
    "ffn": frozenset({TensorPart.FFN}),
    "norms": frozenset({TensorPart.NORM}),
    "final_norm": frozenset({TensorPart.FINAL_NORM}),
    "experts": frozenset(
        {TensorPart.EXPERTS, TensorPart.ROUTER, TensorPart.EXPERT_NORM, TensorPart.BIAS, TensorPart.CUTOFF}
    ),
}


def is_frozen(config: Config, tensor: LayerTensor) -> bool:
    """Whether training leaves a tensor as it is."""
    return any(matches(entry, tensor) for entry in config.optim.freeze)


def matches(entry: str, tensor: LayerTensor) -> bool:
    """Whether a tensor belongs to `text`, or to `text.experts`."""
    modality, _, part = entry.partition(".")
    wanted = PARTS.get(part, frozenset()) if part else frozenset().union(*PARTS.values())
    return tensor.modality == modality and tensor.part in wanted
