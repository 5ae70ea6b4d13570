"""NVFP4 formulas: two levels of scales, rounding to E2M1, Hadamard rotations. Pure tensor functions for any device.

As Transformer-Engine 2.11's NVFP4QuantizerRef (custom_recipes/quantization_nvfp4.py), bit for bit, and its recipe
NVFP4BlockScaling (arXiv 2509.25149): blocks of 16 values with a scale in E4M3, times one fp32 scale of the tensor. The
reference rounds to nearest only. The recipe rounds gradients stochastically, with random numbers of the GPU; here they
are a function of a seed, the step and the values of a block, so that they are the same in every layout.

Shapes: M rows, K columns, leading dimensions L (experts).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from mmscale.model.fp8_formats import E4M3, Blocks, Quantized, blocked, whole

LARGEST, LARGEST_SCALE = 6.0, 448.0  # of E2M1 and of E4M3
HADAMARD = 16
# Of the rotation, one for each of the 16 rows; fixed in Transformer-Engine (get_wgrad_sign_vector).
_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
_FP32_MAX = torch.finfo(torch.float32).max
_BITS = 0xFFFFFFFF


@dataclass(frozen=True)
class Dice:
    """What random numbers of stochastic rounding depend on, besides the values.

    Attributes:
        seed: of the run and the tensor.
        step: number of the optimizer step.
    """

    seed: int
    step: int


@functools.cache
def rotation() -> Tensor:
    """[16, 16] fp32, orthogonal: a diagonal of signs times Sylvester's Hadamard matrix, divided by 4."""
    matrix = torch.ones(1, 1)
    while len(matrix) < HADAMARD:
        matrix = torch.cat((torch.cat((matrix, matrix), dim=1), torch.cat((matrix, -matrix), dim=1)))
    return torch.tensor(_SIGNS, dtype=torch.float32).unsqueeze(1) * matrix / HADAMARD**0.5


def rotated(tensor: Tensor) -> Tensor:
    """Multiply each 16 neighbours of a column of [..., M, K] by the rotation, in the tensor's type; M is 16 n.

    A product that sums over M does not change if both of its factors are rotated.
    """
    groups = tensor.unflatten(-2, (-1, HADAMARD))  # [..., M / 16, 16, K]
    matrix = rotation().to(device=tensor.device, dtype=tensor.dtype)
    return (matrix.t() @ groups).flatten(-3, -2)


def quantize(tensor: Tensor, amax: Tensor, blocks: Blocks, *, dice: Dice | None = None) -> Quantized:
    """Quantize [..., M, K] to E2M1; blocks at the edges may be smaller.

    Args:
        tensor: the values, rotated already if the product needs it.
        amax: [..., 1, 1] of the whole tensor, as from fp8_formats.amax_of.
        blocks: which values share a scale in E4M3.
        dice: round stochastically; None: to nearest even.

    Returns:
        Codes as E4M3 numbers (E2M1's are among them), scales of blocks, and the tensor's fp32 factor.
    """
    values = blocked(tensor.detach().float(), blocks)
    encode = torch.div(LARGEST * LARGEST_SCALE, amax).clamp(max=_FP32_MAX)
    encode = torch.where(encode == 0.0, 1.0, encode)[..., None, None]
    largest = values.abs().amax(dim=(-3, -1), keepdim=True)
    decode = (torch.div(largest, LARGEST) * encode).clamp(max=LARGEST_SCALE).to(E4M3).float()
    scale = torch.div(1.0, decode * torch.div(1.0, encode)).clamp(max=_FP32_MAX)
    scaled = (values * scale).clamp(-LARGEST, LARGEST)
    draws = None if dice is None else _draws(values, largest, dice)
    codes = whole(rounded(scaled, draws).to(E4M3), tensor.shape)
    return Quantized(codes, decode[..., 0, :, 0], blocks, amax / (LARGEST * LARGEST_SCALE))


def rounded(values: Tensor, draws: Tensor | None = None) -> Tensor:
    """Round fp32 values from -6 to 6 to 0, 0.5, 1, 1.5, 2, 3, 4 and 6 and their negatives.

    Args:
        values: any shape.
        draws: numbers in [0, 1) of that shape: a value is rounded away from zero if its distance to the number below,
            as a share of the gap, is larger. None: to nearest, ties to the even code.
    """
    size = values.abs()
    gap = torch.where(size < 2.0, 0.5, torch.where(size < 4.0, 1.0, 2.0))
    steps = size / gap
    number = steps.round() if draws is None else steps.floor() + (draws < steps - steps.floor())
    return torch.copysign(number * gap, values)


def _draws(values: Tensor, largest: Tensor, dice: Dice) -> Tensor:
    """Random numbers in [0, 1), 24 bits each, for blocked values [..., down, rows, across, columns].

    They depend on the value in bf16, the block's largest one and the place in the block, and neither on the block's
    place in the tensor nor on the rank.
    """
    rows, columns = values.shape[-3], values.shape[-1]
    place = torch.arange(rows * columns, device=values.device).view(rows, 1, columns)
    mixed = _mixed(_mixed(place ^ (dice.seed & _BITS)) ^ (dice.step & _BITS))
    mixed = _mixed(_mixed(mixed ^ _code(largest)) ^ _code(values))
    return (mixed >> 8).float() * 2.0**-24


def _code(values: Tensor) -> Tensor:
    """The 16 bits of values in bf16, as int64."""
    return values.bfloat16().view(torch.int16).long() & 0xFFFF


def _mixed(bits: Tensor) -> Tensor:
    """MurmurHash3's finalizer, on int64 with 32 used bits."""
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & _BITS
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & _BITS
    return bits ^ (bits >> 16)
