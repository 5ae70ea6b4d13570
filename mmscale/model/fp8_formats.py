"""FP8 formulas: scales from amax values, rounding, blocks. Pure tensor functions for any device; no model, no groups.

Bit-identical to Transformer-Engine 2.11: CurrentScalingQuantizerRef (quantization_current_scaling.py) for scales from
the tensor itself, the fused update (delayed_scaling.cu) for delayed ones, and compute_scale_from_amax
(recipe_common.cuh) for amax values that are not finite, where the kernels use 1 and the Python reference uses 0 or NaN.
MXFP8 (OCP Microscaling Formats 1.0): blocks of 32 with scales that are powers of two, as in float_to_e8m0 (ptx.cuh).

The amax is taken first, then values are clamped, then cast: torch 2.11 casts values out of range to NaN and torch 2.13
to the largest value, infinities included.

Shapes: M rows, K columns, leading dimensions L (experts).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor
from torch.nn import functional as F

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BLOCK, MX_BLOCK, FP4_BLOCK = 128, 32, 16
_FP32_MAX = torch.finfo(torch.float32).max


class Blocks(StrEnum):
    """Which values of a matrix [M, K] share a scale.

    TENSOR: all of them.
    ROW: 128 neighbours in a row: activations and gradients, along the dimension that the product sums over.
    COLUMN: 128 neighbours in a column: the same tensors in the product that gives the weight's gradient.
    TILE: 128 x 128 values: weights, which are read in both directions.
    MX_ROW, MX_COLUMN: 32 neighbours in a row or column, for MXFP8.
    FP4_ROW, FP4_COLUMN, FP4_TILE: 16 neighbours in a row or column, or 16 x 16 values, for NVFP4 (fp4_formats.py).
    FP4_ROTATED: FP4_COLUMN, of values that a Hadamard rotation has mixed.
    """

    TENSOR = "tensor"
    ROW = "row"
    COLUMN = "column"
    TILE = "tile"
    MX_ROW = "mx_row"
    MX_COLUMN = "mx_column"
    FP4_ROW = "fp4_row"
    FP4_COLUMN = "fp4_column"
    FP4_TILE = "fp4_tile"
    FP4_ROTATED = "fp4_rotated"

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of a block."""
        return {
            Blocks.ROW: (1, BLOCK),
            Blocks.COLUMN: (BLOCK, 1),
            Blocks.TILE: (BLOCK, BLOCK),
            Blocks.MX_ROW: (1, MX_BLOCK),
            Blocks.MX_COLUMN: (MX_BLOCK, 1),
            Blocks.FP4_ROW: (1, FP4_BLOCK),
            Blocks.FP4_COLUMN: (FP4_BLOCK, 1),
            Blocks.FP4_TILE: (FP4_BLOCK, FP4_BLOCK),
            Blocks.FP4_ROTATED: (FP4_BLOCK, 1),
        }[self]

    @property
    def microscaled(self) -> bool:
        """Whether scales are those of MXFP8."""
        return self in (Blocks.MX_ROW, Blocks.MX_COLUMN)

    @property
    def four_bits(self) -> bool:
        """Whether values are those of NVFP4."""
        return self in (Blocks.FP4_ROW, Blocks.FP4_COLUMN, Blocks.FP4_TILE, Blocks.FP4_ROTATED)


@dataclass(frozen=True)
class Quantized:
    """A tensor [..., M, K] in FP8.

    Attributes:
        codes: FP8 values, of the tensor's shape.
        scale_inv: fp32 factors that turn codes into values: [..., 1, 1], or one for each block.
        blocks: which values share a scale; with TENSOR, all values of one index of the leading dimensions do.
        factor: [..., 1, 1] fp32, of all values of the tensor, besides `scale_inv` (NVFP4); None: 1.
    """

    codes: Tensor
    scale_inv: Tensor
    blocks: Blocks
    factor: Tensor | None = None

    def dequantized(self) -> Tensor:
        """The values in fp32, of the shape of the codes, without `factor`."""
        if self.blocks is Blocks.TENSOR:
            return self.codes.float() * self.scale_inv
        values = blocked(self.codes.float(), self.blocks) * self.scale_inv[..., :, None, :, None]
        return whole(values, self.codes.shape)


def largest(dtype: torch.dtype) -> float:
    """The largest value of an FP8 format: 448 for e4m3, 57344 for e5m2."""
    return float(torch.finfo(dtype).max)


def amax_of(tensor: Tensor) -> Tensor:
    """Max |x| over the last two dimensions, fp32 [..., 1, 1]; 0 if there are no values."""
    if tensor.numel() == 0:
        return torch.zeros(*tensor.shape[:-2], 1, 1, device=tensor.device)
    return tensor.detach().abs().amax(dim=(-2, -1), keepdim=True).float()


def scale_of(
    amax: Tensor,
    dtype: torch.dtype,
    *,
    power_of_two: bool = False,
    eps: float = 0.0,
    source: torch.dtype = torch.float32,
) -> Tensor:
    """The factor with which a tensor with this amax is multiplied before the cast.

    Args:
        amax: fp32, any shape.
        dtype: FP8 format.
        power_of_two: clear the mantissa of the scale, i.e. round it down to a power of two.
        eps: lower bound of amax.
        source: format of the tensor; its largest value is the scale if the quotient overflows.

    Returns:
        fp32: largest(dtype) / max(amax, eps); 1 where amax is 0, infinite or not a number.
    """
    amax = torch.where(amax < eps, eps, amax)
    # Not `number / tensor`, which multiplies with the reciprocal and is one bit off.
    scale = torch.div(largest(dtype), amax)
    scale = torch.where(torch.isinf(scale), torch.finfo(source).max, scale)
    if power_of_two:
        scale = (scale.view(torch.int32) & -(1 << 23)).view(torch.float32)  # keeps sign and exponent
    return torch.where((amax > 0) & torch.isfinite(amax), scale, 1.0)


def mx_scale_of(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor of MXFP8: 2^-e with the smallest e for which no value of the block exceeds the format.

    Args:
        amax: fp32, any shape, not negative.
        dtype: FP8 format.

    Returns:
        fp32 powers of two from 2^-127 to 2^127; 1 where amax is 0, as the exponent of such a block does not matter.
        The exponent of an infinite amax is 127, and that of NaN is NaN, as in E8M0.
    """
    ratio = amax * torch.tensor(1.0 / largest(dtype), dtype=torch.float32, device=amax.device)
    bits = ratio.view(torch.int32)
    exponent, mantissa = bits >> 23, bits & ((1 << 23) - 1)
    # A subnormal up to half of the smallest normal number is 2^-127, the smallest scale.
    up = (mantissa > 0) & (exponent != 254) & ~((exponent == 0) & (mantissa <= 1 << 22))
    exponent = torch.where(torch.isinf(ratio), 254, exponent + up.int())
    scale = torch.exp2((127 - exponent).float())
    scale = torch.where(torch.isnan(ratio), torch.nan, scale)
    return torch.where(ratio == 0, 1.0, scale)


def cast(tensor: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """FP8 codes of tensor * scale, saturated, rounded to nearest even; the tensor's shape. NaN stays NaN.

    Args:
        tensor: of any shape.
        scale: fp32, broadcast to the tensor.
        dtype: FP8 format.
    """
    limit = largest(dtype)
    return (tensor.float() * scale).clamp(-limit, limit).to(dtype)


def quantize_tensor(tensor: Tensor, scale: Tensor, dtype: torch.dtype) -> Quantized:
    """Quantize [..., M, K] with a given scale [..., 1, 1]."""
    return Quantized(cast(tensor, scale, dtype), scale.reciprocal(), Blocks.TENSOR)


def quantize_blocks(tensor: Tensor, dtype: torch.dtype, blocks: Blocks) -> Quantized:
    """Quantize [..., M, K] with a power-of-two scale for each block; blocks at the edges may be smaller."""
    values = blocked(tensor.detach().float(), blocks)
    amax = values.abs().amax(dim=(-3, -1))
    if blocks.microscaled:
        scale = mx_scale_of(amax, dtype)
    else:
        scale = scale_of(amax, dtype, power_of_two=True, source=tensor.dtype)
    codes = cast(values, scale[..., :, None, :, None], dtype)
    return Quantized(whole(codes, tensor.shape), scale.reciprocal(), blocks)


def blocked(tensor: Tensor, blocks: Blocks) -> Tensor:
    """[..., M, K] -> [..., block rows, rows in a block, block columns, columns in a block], padded with zeros."""
    rows, columns = blocks.shape
    height, width = tensor.shape[-2:]
    down, across = -(-height // rows), -(-width // columns)
    if (down * rows, across * columns) != (height, width):
        tensor = F.pad(tensor, (0, across * columns - width, 0, down * rows - height))
    return tensor.reshape(*tensor.shape[:-2], down, rows, across, columns)


def whole(blocked: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `blocked`: [..., block rows, rows, block columns, columns] -> `shape`, without the padding."""
    *leading, down, rows, across, columns = blocked.shape
    return blocked.reshape(*leading, down * rows, across * columns)[..., : shape[-2], : shape[-1]]


def product(left: Quantized, right: Quantized, out: torch.dtype) -> Tensor:
    """[L, M, K] x [L, K, N] summed in fp32, as FP8 tensor cores do.

    With one scale per tensor the codes are multiplied and the sum is scaled. With blocks the dequantized values are
    multiplied: the scales are powers of two, or codes and scales have 6 bits together (NVFP4), so this is exact.
    """
    if left.blocks is Blocks.TENSOR and right.blocks is Blocks.TENSOR:
        summed = torch.bmm(left.codes.float(), right.codes.float())
        return (summed * (left.scale_inv * right.scale_inv)).to(out)
    summed = torch.bmm(left.dequantized(), right.dequantized())
    if left.factor is not None and right.factor is not None:
        summed = summed * (left.factor * right.factor)
    return summed.to(out)


def transposed(quantized: Quantized) -> Quantized:
    """[..., M, K] -> [..., K, M]; blocks along rows become blocks along columns."""
    turns = (
        (Blocks.ROW, Blocks.COLUMN),
        (Blocks.MX_ROW, Blocks.MX_COLUMN),
        (Blocks.FP4_ROW, Blocks.FP4_COLUMN),
        (Blocks.FP4_ROW, Blocks.FP4_ROTATED),
    )
    turned = dict(turns[:3]) | {column: row for row, column in turns}
    blocks = turned.get(quantized.blocks, quantized.blocks)
    scales = quantized.scale_inv.transpose(-2, -1)
    return Quantized(quantized.codes.transpose(-2, -1), scales, blocks, quantized.factor)


def update_delayed(history: Tensor, scale: Tensor, limit: Tensor, *, margin: int, most_recent: bool) -> None:
    """Update scales from the amax history, in place; entry 0 of the history is the newest and is cleared.

    Args:
        history: [steps, ...] fp32 amax values; entry 0 of the step that ends, entry 1 the oldest, the last one the
            newest before it, in Transformer-Engine's order.
        scale: [...] fp32; unchanged where amax is 0, infinite or NaN.
        limit: [...] fp32, largest value of each tensor's format.
        margin: scales are divided by 2^margin.
        most_recent: use entry 0 instead of the largest of all.
    """
    amax = history[0].clone() if most_recent else history.amax(dim=0)
    rolled = history.roll(-1, 0)
    rolled[0] = 0.0
    history.copy_(rolled)
    fresh = limit * 0.5**margin / amax
    fresh = torch.where((amax > 0.0) & torch.isfinite(amax), fresh, scale)
    scale.copy_(torch.where(torch.isinf(fresh), _FP32_MAX, fresh))
