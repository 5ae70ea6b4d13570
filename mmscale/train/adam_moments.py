"""Adam's moments in FP8, a group of 128 at a time, with COAT's dynamic range expansion (arXiv 2410.19313, 4.1).

Not an optimizer and not a file format: formulas on tensors. adam_compact.py trains with them, optimizer_moments.py
brings them into checkpoints.

E4M3 spans a ratio of 2e5, a group of first moments about 1e3 and of second moments about 1e1 (COAT): most codes would
never be used. So a group is stored as `f(x) = sign(x) |x / middle|^k * scale`, with the k that spreads it over E4M3:

    middle = sqrt(max * min)            of the magnitudes that are not zero
    k      = floor(16 * log2(448^2 / 2) / log2(max / min)) / 16
    scale  = 448 / (max / middle)^k

One byte an element and three fp32 numbers a group: 1 + 12 / 128 bytes for a moment, 2.19 for both, instead of 8.

What differs from the paper, because a group with one tiny value (an expert that few tokens reach) would otherwise take
all precision from the other 127: k stays between 1/4 and 16. Whatever is then too small for E4M3 becomes zero in the
first moment and the smallest code in the second: a second moment of zero under a first moment that is not would make
the update as large as 1 / eps.

Letters: G groups, E = 128 elements of a group.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

GROUP = 128  # elements that share a scale
TRIPLE = 3  # numbers of a group: scale, exponent, middle
LARGEST = 448.0  # of E4M3
RANGE = math.log2(LARGEST**2 / 2)  # octaves that a group is spread over, 16.6 of E4M3's 17.8
EXPONENT_STEP = 1 / 16
EXPONENT_MIN, EXPONENT_MAX = 0.25, 16.0
_TINY = torch.finfo(torch.float32).tiny
_HUGE = torch.finfo(torch.float32).max


class Packed(NamedTuple):
    """Groups as they are stored.

    Attributes:
        codes: [G, E], E4M3 as uint8: every copy, comparison and file format knows bytes.
        triples: [G, 3], fp32: scale, exponent, middle.
    """

    codes: Tensor
    triples: Tensor


def pack(values: Tensor, *, keep_positive: bool) -> Packed:
    """Quantise groups.

    Args:
        values: [G, E], fp32, finite.
        keep_positive: what is not zero stays so (second moments).
    """
    magnitude = values.abs().clamp(max=_HUGE)
    largest = magnitude.amax(dim=1, keepdim=True)
    smallest = torch.where(magnitude > 0, magnitude, math.inf).amin(dim=1, keepdim=True)
    smallest = torch.maximum(smallest, largest * 2.0 ** (-RANGE / EXPONENT_MIN)).clamp(min=_TINY)
    largest = torch.maximum(largest, _TINY * torch.ones_like(largest))
    smallest = torch.minimum(smallest, largest)  # of a group of zeros it was infinite
    octaves = largest.log2() - smallest.log2()
    exponent = ((RANGE / octaves).div(EXPONENT_STEP).floor() * EXPONENT_STEP).clamp(EXPONENT_MIN, EXPONENT_MAX)
    middle = largest.sqrt() * smallest.sqrt()
    scale = LARGEST / (largest / middle).pow(exponent)
    expanded = (magnitude / middle).pow(exponent).mul_(scale).clamp_(max=LARGEST).copysign_(values)
    codes = expanded.to(torch.float8_e4m3fn).view(torch.uint8)
    if keep_positive:
        codes = torch.where((codes == 0) & (magnitude > 0), 1, codes)
    return Packed(codes, torch.cat((scale, exponent, middle), dim=1))


def unpack(codes: Tensor, triples: Tensor) -> Tensor:
    """The fp32 values of codes.

    Args:
        codes: [..., E], uint8.
        triples: [..., 3], of all elements of the last dimension.
    """
    scale, exponent, middle = triples.unsqueeze(-1).unbind(dim=-2)
    expanded = codes.view(torch.float8_e4m3fn).float()
    return (expanded.abs() / scale).pow(1.0 / exponent).mul_(middle).copysign_(expanded)


def group_count(numel: int, lead: int) -> int:
    """Groups of a shard that begins `lead` elements behind the border of a group."""
    return -(-(lead + numel) // GROUP)


def to_groups(flat: Tensor, lead: int) -> Tensor:
    """[n] -> [G, E]: what the first and the last group miss is zero, which changes no formula above."""
    behind = group_count(flat.numel(), lead) * GROUP - lead - flat.numel()
    padded = functional.pad(flat, (lead, behind)) if lead or behind else flat
    return padded.view(-1, GROUP)


def from_groups(groups: Tensor, lead: int, numel: int) -> Tensor:
    """The inverse of `to_groups`; a view."""
    return groups.reshape(-1)[lead : lead + numel]
