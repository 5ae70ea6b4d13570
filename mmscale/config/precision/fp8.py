"""Shape requirements of FP8: static slots are rounded up to multiples, and each rounding is reported.

Source: Transformer-Engine 2.11 asserts rows % 8 and last dimensions % 16, and expert rows are aligned to 16 for every
recipe of sm_90. MXFP8 needs whole blocks of 32 in both dimensions. NVFP4's products sum over multiples of 32, and its
kernels for groups of rows take multiples of 128 (get_align_size_for_quantization, 2.14 to 2.20). A blockwise tensor
that is gathered (sequence parallelism) needs whole blocks of 128 in both dimensions.
"""

from __future__ import annotations

import math

from mmscale.config.schema import Config

_ALIGNMENT, _MX_ALIGNMENT, BLOCK = 16, 32, 128


def alignment(config: Config) -> int:
    """Divisor of the rows and widths of an FP8 product; 1 without FP8."""
    return alignment_of(config.precision.fp8)


def alignment_of(recipe: str) -> int:
    """The same for a value of precision.fp8."""
    return {"off": 1, "mxfp8": _MX_ALIGNMENT, "nvfp4": _MX_ALIGNMENT}.get(recipe, _ALIGNMENT)


def group_multiple_of(recipe: str) -> int:
    """Divisor of the rows of each group of a grouped product, for a value of precision.fp8."""
    return BLOCK if recipe == "nvfp4" else alignment_of(recipe)


def blocks_are_gathered(config: Config) -> bool:
    """Whether blockwise tensors are communicated between ranks, which requires whole blocks."""
    return config.precision.fp8 == "blockwise" and config.parallel.tp > 1


def row_multiple(config: Config) -> int:
    """Divisor of the rows of an FP8 product and of the slots of an expert [tokens]; 1 without FP8."""
    return BLOCK if blocks_are_gathered(config) else group_multiple_of(config.precision.fp8)


def capacity_multiple(config: Config) -> int:
    """The multiple to which slots of an expert are rounded up: model.experts.capacity_multiple and FP8's [tokens]."""
    return math.lcm(config.model.experts.capacity_multiple, row_multiple(config))


def depth_multiple(config: Config) -> int:
    """The multiple to which the tokens that a Mixture-of-Depths layer selects are rounded up [tokens]."""
    depth = config.model.depth
    return math.lcm(1 if depth is None else depth.multiple, row_multiple(config))


def roundings(config: Config) -> list[str]:
    """One line for each setting that FP8 rounds up; `mmscale plan` shows the cost."""
    model, rows = config.model, row_multiple(config)
    found = []
    if model.has_experts:
        found.append(("model.experts.capacity_multiple", model.experts.capacity_multiple, capacity_multiple(config)))
    if model.depth is not None:
        found.append(("model.depth.multiple", model.depth.multiple, depth_multiple(config)))
    why = f"precision.fp8 = {config.precision.fp8} takes rows in multiples of {rows}"
    if blocks_are_gathered(config):
        why += f" with parallel.tp = {config.parallel.tp}, and of {alignment(config)} with tp = 1"
    return [f"{key} = {given} is taken as {taken}: {why}" for key, given, taken in found if given != taken]


def high_precision(config: Config) -> Config:
    """The same model without FP8, with the slot counts of FP8: for inference and for later training stages."""
    if config.precision.fp8 == "off":
        return config
    model = config.model
    experts = model.experts.model_copy(update={"capacity_multiple": capacity_multiple(config)})
    depth = None if model.depth is None else model.depth.model_copy(update={"multiple": depth_multiple(config)})
    # Also resets the settings that the rules refuse without a recipe; margins and formats have no effect then.
    off = {"fp8": "off", "fp8_emulate": False, "fp8_skip_first": 0, "fp8_skip_last": 0}
    precision = config.precision.model_copy(update=off)
    return config.model_copy(
        update={"model": model.model_copy(update={"experts": experts, "depth": depth}), "precision": precision}
    )
