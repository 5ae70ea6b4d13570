"""Converts `precision.fp8` to megatron-core's FP8 and FP4 fields, for layers of Transformer-Engine.

With emulated FP8 none of them is set: megatron-core would enter Transformer-Engine's FP8 context or, if
Transformer-Engine is not installed, a null context that silently trains in bf16 (fp8_utils.py).
"""

from __future__ import annotations

from typing import Any

from mmscale.config import Config
from mmscale.errors import ConfigError
from mmscale.runtime import transformer_engine


def fp8_settings(config: Config) -> dict[str, Any]:
    """Arguments of TransformerConfig; none without FP8 or with emulated FP8.

    Raises:
        ConfigError: FP8 is requested and Transformer-Engine is not installed, or this GPU has no MXFP8 or NVFP4.
    """
    precision = config.precision
    if precision.fp8 == "off" or precision.emulated:
        return {}
    if (missing := transformer_engine.problem()) is not None:
        raise ConfigError(
            f"precision.fp8 = {precision.fp8} needs Transformer-Engine, but {missing}",
            remedy="set precision.fp8=off, or precision.fp8_emulate=true to study what FP8 does to the loss",
        )
    if (missing := transformer_engine.blackwell_problem(precision.fp8)) is not None:
        raise ConfigError(
            f"precision.fp8 = {precision.fp8} cannot run here: {missing}",
            remedy="use precision.fp8=blockwise, or precision.fp8_emulate=true to study what "
            f"{precision.fp8.upper()} does to the loss",
        )
    layers = {
        "first_last_layers_bf16": bool(precision.fp8_skip_first or precision.fp8_skip_last),
        "num_layers_at_start_in_bf16": precision.fp8_skip_first,
        "num_layers_at_end_in_bf16": precision.fp8_skip_last,
    }
    if precision.fp8 == "nvfp4":
        return {"fp4": "e2m1", "fp4_recipe": "nvfp4", **layers}
    return {
        "fp8": precision.fp8_format,
        "fp8_recipe": precision.fp8,
        "fp8_margin": precision.fp8_margin,
        "fp8_amax_history_len": precision.fp8_amax_history,
        "fp8_amax_compute_algo": precision.fp8_amax_choice,
        "fp8_wgrad": True,
        "tp_only_amax_red": False,
        **layers,
    }
