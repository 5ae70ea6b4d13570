"""Stretched rotary position embeddings, `model.rope_scaling`: angles and the length of queries and keys.

megatron-core's GPTModel builds an unscaled table of angles, whose speeds are replaced here by its own formulas. They
give the numbers of transformers' `modeling_rope_utils.py`, by which exports compute. megatron-core's
YarnRotaryEmbedding is not used: it takes no attention factor, and GPTModel reads its arguments from attributes that
TransformerConfig does not have.

D: width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_find_correction_range,
    _yarn_linear_ramp_mask,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mmscale.config import ModelConfig, RopeScalingConfig

Scaled = Callable[[RotaryEmbedding, ModelConfig, RopeScalingConfig], Tensor]


def _llama3(rope: RotaryEmbedding, _: ModelConfig, scaling: RopeScalingConfig) -> Tensor:
    scaled: Tensor = rope._apply_scaling(
        rope.inv_freq,
        factor=scaling.factor,
        low_freq_factor=scaling.low_freq_factor,
        high_freq_factor=scaling.high_freq_factor,
        original_max_position_embeddings=scaling.original_max_position_embeddings,
    )
    return scaled


def _linear(rope: RotaryEmbedding, _: ModelConfig, scaling: RopeScalingConfig) -> Tensor:
    """Position interpolation, arXiv 2306.15595."""
    speeds: Tensor = rope.inv_freq
    return speeds / scaling.factor


def _yarn(rope: RotaryEmbedding, model: ModelConfig, scaling: RopeScalingConfig) -> Tensor:
    """NTK by parts, arXiv 2309.00071 section 3.2; the ramp is linear in the number of the angle, as in its code."""
    speeds: Tensor = rope.inv_freq
    low, high = _yarn_find_correction_range(
        scaling.beta_fast,
        scaling.beta_slow,
        model.head_dim,
        model.rope_base,
        scaling.original_max_position_embeddings,
        scaling.truncate,
    )
    divided = _yarn_linear_ramp_mask(low, high, len(speeds), device=speeds.device)
    return speeds / scaling.factor * divided + speeds * (1.0 - divided)


SCALINGS: dict[str, Scaled] = {"llama3": _llama3, "linear": _linear, "yarn": _yarn}


def scale_angles(rope: RotaryEmbedding, model: ModelConfig) -> None:
    """Replace the [D / 2] speeds, in radians per position, of a table of angles that nothing has been read from yet."""
    if model.rope_scaling is not None:
        rope.inv_freq = SCALINGS[model.rope_scaling.rope_type](rope, model, model.rope_scaling)


def attention_factor(scaling: RopeScalingConfig | None) -> float:
    """What queries and keys are multiplied by when they are rotated; attention logits get its square."""
    if scaling is None or scaling.rope_type != "yarn":
        return 1.0
    return 0.1 * math.log(scaling.factor) + 1.0 if scaling.attention_factor is None else scaling.attention_factor


def lengthen(transformer: TransformerConfig, model: ModelConfig) -> None:
    """Make megatron-core's attention multiply queries and keys by the attention factor.

    It computes (0.1 * yarn_mscale * ln(scale) + 1) / (0.1 * yarn_mscale_all_dim * ln(scale) + 1) for these attributes
    (`_yarn_get_concentration_factor_from_config`), which are no fields of its configuration.
    """
    factor = attention_factor(model.rope_scaling)
    if factor != 1.0:
        transformer.yarn_rotary_scaling_factor = math.exp(10.0)
        transformer.yarn_mscale = factor - 1.0
        transformer.yarn_mscale_all_dim = 0.0
