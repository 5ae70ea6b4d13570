"""Settings of number formats (`precision`)."""

from __future__ import annotations

from typing import Literal

from mmscale.config.section import Count, Index, Section, setting


class PrecisionConfig(Section):
    """Number formats."""

    dtype: Literal["fp32", "bf16"] = setting(
        "Parameters and activations; with bf16 the optimizer keeps fp32 copies.", "bf16"
    )
    fp8: Literal["off", "delayed", "tensorwise", "blockwise", "mxfp8", "nvfp4"] = setting(
        "Compute the matrix products of attention and experts in FP8, with these scales. delayed: one scale per "
        "tensor, from the amax of earlier steps; tensorwise: one scale per tensor, from the tensor itself; blockwise: "
        "one scale for 1 x 128 values of activations and gradients and for 128 x 128 values of weights; mxfp8: one "
        "scale for 32 values of any tensor (Blackwell GPUs); nvfp4: 4 bits, one scale for 16 values, 16 x 16 values of "
        "weights, and one for the tensor (Blackwell GPUs). Routers, norms, embedding and output layer stay in `dtype`.",
        "off",
        source="Transformer-Engine 2.9-2.20: DelayedScaling, Float8CurrentScaling, Float8BlockScaling, "
        "MXFP8BlockScaling, NVFP4BlockScaling",
    )
    fp4_stochastic_rounding: bool = setting("nvfp4: round gradients up or down at random, without bias.", True)
    fp4_hadamard: bool = setting(
        "nvfp4: mix 16 neighbouring rows of both factors of a weight's gradient by a Hadamard matrix, which spreads "
        "outliers.",
        True,
    )
    fp8_emulate: bool = setting(
        "Round to FP8 and back in plain torch, on any device: for studying what FP8 does to a loss, not for speed.",
        False,
    )
    fp8_format: Literal["hybrid", "e4m3"] = setting(
        "hybrid: e4m3 forward and e5m2 for gradients; e4m3: both.", "hybrid"
    )
    fp8_margin: Index = setting(
        "delayed: scales are divided by 2^margin, as headroom for growing values.", 0, unit="powers of two"
    )
    fp8_amax_history: Count = setting("delayed: length of the amax history.", 1024, unit="steps")
    fp8_amax_choice: Literal["max", "most_recent"] = setting(
        "delayed: amax value of the history that sets the scale.", "max"
    )
    fp8_skip_first: Index = setting("Number of first layers that stay in `dtype`.", 0, unit="layers")
    fp8_skip_last: Index = setting("Number of last layers that stay in `dtype`.", 0, unit="layers")

    @property
    def emulated(self) -> bool:
        """Whether plain torch emulates the rounding of products to FP8."""
        return self.fp8 != "off" and self.fp8_emulate
