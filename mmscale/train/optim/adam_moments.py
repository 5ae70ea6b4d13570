"""Adam's moments in FP8, in groups of 128, with COAT's dynamic range expansion (arXiv 2410.19313, 4.1).

This module has the formulas on tensors: adam_compact.py trains with them, stored_moments.py stores them in checkpoints.

E4M3 covers a ratio of 2e5 between its largest and smallest value. Within a group, first moments cover about 1e3 and
second moments about 1e1 (COAT), so most codes would never be used. A group is therefore stored as
`f(x) = sign(x) |x / middle|^k * scale`, with the k that spreads it over E4M3:

    middle = sqrt(max * min)            of the magnitudes that are not zero
    k      = floor(16 * log2(448^2 / 2) / log2(max / min)) / 16
    scale  = 448 / (max / middle)^k

One byte per element and three fp32 numbers per group: 1 + 12 / 128 bytes for a moment, 2.19 for both, instead of 8.

Difference from the paper: k stays between 1/4 and 16, because a group with one tiny value (an expert that few tokens
reach) would otherwise lose all precision of its other 127. Values that are then too small for E4M3 become zero in the
first moment and the smallest code in the second: a second moment of zero under a nonzero first moment would make the
update as large as 1 / eps.

Letters: G groups, E = 128 elements of a group.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

GROUP = 128  # elements that share a scale
TRIPLE = 3  # numbers of a group: scale, exponent, middle
LARGEST = 448.0  # of E4M3
RANGE = math.log2(LARGEST**2 / 2)  # octaves (powers of 2) that a group is spread over, 16.6 of E4M3's 17.8
EXPONENT_STEP = 1 / 16
EXPONENT_MIN, EXPONENT_MAX = 0.25, 16.0
_LARGEST_OCTAVE = math.log2(LARGEST)
_LOWEST = math.log2(torch.finfo(torch.float32).tiny)
_HUGE = torch.finfo(torch.float32).max


class Packed(NamedTuple):
    """Quantised groups.

    Attributes:
        codes: [G, E], E4M3 stored as uint8, which every copy, comparison and file format supports.
        triples: [G, 3], fp32: scale, exponent, middle.
    """

    codes: Tensor
    triples: Tensor


def pack(values: Tensor, *, keep_positive: bool) -> Packed:
    """Quantise groups. The computation uses logarithms, so that powers become products.

    Args:
        values: [G, E], fp32, finite.
        keep_positive: values that are not zero must not become zero (second moments).
    """
    octaves = values.abs().clamp_(max=_HUGE).log2_()  # zero: -inf
    largest = octaves.amax(dim=1, keepdim=True).clamp_(min=_LOWEST)
    smallest = octaves.masked_fill(octaves == -math.inf, math.inf).amin(dim=1, keepdim=True)
    smallest = torch.maximum(smallest, largest - RANGE / EXPONENT_MIN).clamp_(min=_LOWEST)
    smallest = torch.minimum(smallest, largest)  # in a group of zeros `smallest` was infinite
    exponent = (RANGE / (largest - smallest)).div_(EXPONENT_STEP).floor_().mul_(EXPONENT_STEP)
    exponent = exponent.clamp_(EXPONENT_MIN, EXPONENT_MAX)
    middle = (largest + smallest) / 2
    scale = _LARGEST_OCTAVE - exponent * (largest - middle)
    expanded = octaves.sub_(middle).mul_(exponent).add_(scale).exp2_().clamp_(max=LARGEST)
    codes = expanded.to(torch.float8_e4m3fn).view(torch.uint8)
    signs = (values < 0).to(torch.uint8) << 7
    codes = codes + ((codes == 0) & (values > 0)) if keep_positive else codes | signs
    return Packed(codes, torch.cat((scale.exp2(), exponent, middle.exp2()), dim=1))


def unpack(codes: Tensor, triples: Tensor) -> Tensor:
    """The fp32 values of codes.

    Args:
        codes: [..., E], uint8.
        triples: [..., 3], one triple for all elements of the last dimension.
    """
    scale, exponent, middle = triples.unsqueeze(-1).unbind(dim=-2)
    slope = exponent.reciprocal()
    octaves = _octaves(codes.device).index_select(0, codes.reshape(-1).int()).view(codes.shape)
    values = octaves.mul_(slope).add_(middle.log2() - scale.log2() * slope).exp2_()
    return values.copysign_(codes.view(torch.int8))


@functools.cache
def _octaves(device: torch.device) -> Tensor:
    """[256] log2 of the magnitude of each code. On a host a look-up takes a fifth of the time of a conversion."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float().abs().log2()


def group_count(numel: int, lead: int) -> int:
    """Number of groups that a shard overlaps which begins `lead` elements after the start of a group."""
    return -(-(lead + numel) // GROUP)


def to_groups(flat: Tensor, lead: int) -> Tensor:
    """[n] -> [G, E]: the first and the last group are padded with zeros, which change no formula above."""
    behind = group_count(flat.numel(), lead) * GROUP - lead - flat.numel()
    padded = functional.pad(flat, (lead, behind)) if lead or behind else flat
    return padded.view(-1, GROUP)


def from_groups(groups: Tensor, lead: int, numel: int) -> Tensor:
    """The inverse of `to_groups`; a view."""
    return groups.reshape(-1)[lead : lead + numel]
