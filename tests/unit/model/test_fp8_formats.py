"""FP8 in formulas, against scales and roundings written down number by number."""

from __future__ import annotations

import itertools
import math
import struct
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmscale.model import fp8_formats as formats
from mmscale.model.fp8_formats import E4M3, E5M2, Blocks, Quantized

LARGEST = {E4M3: 448.0, E5M2: 57344.0}
FP32_MAX = float(np.finfo(np.float32).max)
BF16_MAX = 3.3895313892515355e38


def bits(value: float) -> int:
    """A number as the 32 bits of its fp32."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def scale_by_hand(amax: float, largest: float, *, power_of_two: bool, instead_of_infinity: float) -> float:
    """compute_scale_from_amax of Transformer-Engine, in numpy's fp32."""
    if amax == 0.0 or math.isinf(amax) or math.isnan(amax):
        return 1.0
    with np.errstate(over="ignore"):
        scale = np.float32(largest) / np.float32(amax)
    if np.isinf(scale):
        scale = np.float32(instead_of_infinity)
    if power_of_two:
        scale = np.frombuffer(struct.pack("<I", bits(float(scale)) & 0xFF800000), np.float32)[0]
    return float(scale)


EDGES = [0.0, math.inf, math.nan, 1e-45, 1e-38, 3e38, FP32_MAX, 1.0, 448.0, 449.0, 57344.0, 3.578125, 1e-3, 7.0]


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_scales_at_the_edges(dtype: torch.dtype, power_of_two: bool, source: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    values = [*EDGES, *np.exp(rng.uniform(-90, 80, 200)).astype(np.float32).tolist()]
    found = formats.scale_of(torch.tensor(values), dtype, power_of_two=power_of_two, source=source)
    limit = FP32_MAX if source is torch.float32 else BF16_MAX
    wanted = [
        scale_by_hand(float(np.float32(v)), LARGEST[dtype], power_of_two=power_of_two, instead_of_infinity=limit)
        for v in values
    ]
    assert [bits(v) for v in found.tolist()] == [bits(v) for v in wanted]


def exponent_by_hand(amax: float, largest: float) -> float:
    """The exponent e of a block of MXFP8: the least with amax <= largest * 2^e, from -127 to 127."""
    ratio = float(np.float32(amax) * np.float32(1.0 / largest))
    if math.isnan(ratio):
        return math.nan
    if ratio == 0.0:  # also of the smallest numbers; such a block has no exponent
        return 0
    if math.isinf(ratio):
        return 127
    return max(-127, min(127, math.ceil(math.log2(ratio))))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_scales_of_mxfp8_at_the_edges(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(2)
    powers = [LARGEST[dtype] * 2.0**e for e in (-120, -8, 0, 1, 30)]
    values = [v for v in EDGES if v] + powers + np.exp(rng.uniform(-85, 80, 300)).astype(np.float32).tolist()
    found = formats.mx_scale_of(torch.tensor(values), dtype).tolist()
    for value, scale in zip(values, found, strict=True):
        wanted = exponent_by_hand(float(np.float32(value)), LARGEST[dtype])
        assert math.isnan(scale) if math.isnan(wanted) else scale == 2.0**-wanted, (value, scale, wanted)
    assert formats.mx_scale_of(torch.zeros(1), dtype).tolist() == [1.0]


def test_a_floor_of_amax() -> None:
    found = formats.scale_of(torch.tensor([0.0, 1e-6, 0.5, math.nan]), E4M3, eps=0.25)
    assert found.tolist() == [1792.0, 1792.0, 896.0, 1.0]


def table(dtype: torch.dtype) -> list[float]:
    """All finite values of a format, by its definition: sign, exponent with its bias, mantissa."""
    mantissa, bias = (3, 7) if dtype is E4M3 else (2, 15)
    values = []
    for code in range(128):
        exponent, fraction = code >> mantissa, code & ((1 << mantissa) - 1)
        if dtype is E4M3 and code == 0x7F:  # not a number
            continue
        if dtype is E5M2 and exponent == 31:  # infinity, not a number
            continue
        part = fraction / (1 << mantissa)
        values.append(part * 2.0 ** (1 - bias) if exponent == 0 else (1 + part) * 2.0 ** (exponent - bias))
    return values


def nearest(value: float, values: list[float]) -> float:
    """The nearest one, of two as near the one with the even code; what is larger than all is the largest."""
    size = min(abs(value), values[-1])
    best = min(range(len(values)), key=lambda code: (abs(values[code] - size), code % 2))
    return math.copysign(values[best], value)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_rounds_to_nearest_even_and_saturates(dtype: torch.dtype) -> None:
    values = table(dtype)
    assert values[-1] == LARGEST[dtype] == formats.largest(dtype)
    halves = [(a + b) / 2 for a, b in itertools.pairwise(values)]
    rng = np.random.default_rng(1)
    drawn = (np.exp(rng.uniform(-16, 14, 400)) * rng.choice([-1, 1], 400)).astype(np.float32).tolist()
    tried = [*values, *halves, *drawn, 1e6, -1e6, math.inf, -math.inf, 1e-30, -0.0]
    found = formats.cast(torch.tensor(tried), torch.tensor(1.0), dtype).float().tolist()
    assert found == [nearest(value, values) for value in tried]
    assert formats.cast(torch.tensor([math.nan]), torch.tensor(1.0), dtype).float().isnan().all()


def test_what_is_scaled_beyond_the_format_saturates() -> None:
    """torch 2.11 casts 1000 to NaN, torch 2.13 to 448; neither may be seen."""
    codes = formats.cast(torch.tensor([1.0, 10.0, 1000.0]), torch.tensor(100.0), E4M3)
    assert codes.float().tolist() == [96.0, 448.0, 448.0]


def scales_by_hand(steps: list[float], length: int, *, largest: float, margin: int, most_recent: bool) -> list[float]:
    """The scale after each step, from a list of what was seen."""
    past, scale, scales = [0.0] * (length - 1), 1.0, []
    for seen in steps:
        # The oldest amax still counts in the step at whose end it leaves (quantization.py).
        amax = seen if most_recent else max(seen, *past, 0.0)
        past = [*past, seen][1:]
        if 0.0 < amax < math.inf:
            with np.errstate(over="ignore"):
                scale = min(float(np.float32(largest * 0.5**margin) / np.float32(amax)), FP32_MAX)
        scales.append(scale)
    return scales


@pytest.mark.parametrize("most_recent", [False, True])
@pytest.mark.parametrize("margin", [0, 2])
@pytest.mark.parametrize("length", [1, 2, 6])
def test_delayed_scales_follow_from_the_history(length: int, margin: int, most_recent: bool) -> None:
    """Entry 0 of the history holds what was seen until the update, which leaves it empty."""
    steps = [3.0, 0.5, 0.0, 100.0, 1e-45, 0.25, math.inf, 0.125, 0.1, 0.1, 0.1, 0.1, 0.1, 3e38, 2.0]
    seen = torch.tensor([steps, [step / 2 for step in steps]]).t()
    history, scale = torch.zeros(length, 2), torch.ones(2)
    found = []
    for values in seen:
        history[0] = values
        formats.update_delayed(history, scale, torch.tensor([448.0, 57344.0]), margin=margin, most_recent=most_recent)
        assert history[0].tolist() == [0.0, 0.0]
        found.append([bits(value) for value in scale.tolist()])
    wanted = [
        scales_by_hand(seen[:, index].tolist(), length, largest=largest, margin=margin, most_recent=most_recent)
        for index, largest in enumerate((448.0, 57344.0))
    ]
    assert found == [[bits(one), bits(other)] for one, other in zip(*wanted, strict=True)]


def quantized_by_hand(matrix: Tensor, dtype: torch.dtype, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Values after rounding, and the scale of every element, block by block."""
    rows, columns = blocks.shape
    out, scales = torch.zeros_like(matrix), torch.zeros_like(matrix)
    for top in range(0, matrix.shape[0], rows):
        for left in range(0, matrix.shape[1], columns):
            block = matrix[top : top + rows, left : left + columns]
            amax = float(block.abs().max())
            scale = 2.0 ** -exponent_by_hand(amax, LARGEST[dtype])
            if not blocks.microscaled:
                scale = scale_by_hand(amax, LARGEST[dtype], power_of_two=True, instead_of_infinity=FP32_MAX)
            out[top : top + rows, left : left + columns] = (block * scale).to(dtype).float() / scale
            scales[top : top + rows, left : left + columns] = scale
    return out, scales


IN_BLOCKS = [blocks for blocks in Blocks if blocks is not Blocks.TENSOR]


@pytest.mark.parametrize("blocks", IN_BLOCKS)
@pytest.mark.parametrize("shape", [(256, 384), (48, 80), (130, 144)])
def test_blocks_have_scales_of_their_own(blocks: Blocks, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()
    matrix[5] *= 1000.0  # an outlier of one row
    both = torch.stack((matrix, matrix * 3.0))
    found = formats.quantize_blocks(both, E4M3, blocks)
    assert found.codes.shape == both.shape and found.codes.dtype == E4M3
    for index in range(2):
        values, _ = quantized_by_hand(both[index], E4M3, blocks)
        assert torch.equal(found.dequantized()[index], values)
    turned = formats.transposed(found)
    assert torch.equal(turned.dequantized(), found.dequantized().transpose(-2, -1))


def test_block_scales_are_powers_of_two_so_doubling_changes_no_code() -> None:
    matrix = torch.randn(128, 256, generator=torch.Generator().manual_seed(4))
    for blocks in IN_BLOCKS:
        once, twice = (formats.quantize_blocks(m, E4M3, blocks) for m in (matrix, 2.0 * matrix))
        assert torch.equal(once.codes.view(torch.uint8), twice.codes.view(torch.uint8))
        assert torch.equal(2.0 * once.scale_inv, twice.scale_inv)
        mantissas, _ = torch.frexp(once.scale_inv)
        assert (mantissas == 0.5).all()


def product_error(quantize: Any, gradient: bool = False) -> float:
    """Relative error of a 256 x 256 x 256 product of normal values."""
    generator = torch.Generator().manual_seed(5)
    left, right = (torch.randn(1, 256, 256, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    found = formats.product(quantize(left, E5M2 if gradient else E4M3), quantize(right, E4M3), torch.float32)
    return float((found - exact).norm() / exact.norm())


def by_tensor(tensor: Tensor, dtype: torch.dtype) -> Quantized:
    return formats.quantize_tensor(tensor, formats.scale_of(formats.amax_of(tensor), dtype), dtype)


def test_error_of_a_product() -> None:
    """Rounding errors of 3 (2) bits of mantissa, uniform within half a step, independent in both operands."""
    assert 0.033 < product_error(by_tensor) < 0.041
    assert 0.053 < product_error(by_tensor, gradient=True) < 0.066
    for blocks in (Blocks.TILE, Blocks.MX_ROW):
        assert 0.033 < product_error(lambda t, dtype, blocks=blocks: formats.quantize_blocks(t, dtype, blocks)) < 0.041


def test_a_product_is_that_of_the_rounded_values() -> None:
    generator = torch.Generator().manual_seed(6)
    left, right = torch.randn(2, 48, 144, generator=generator), torch.randn(2, 144, 32, generator=generator)
    for one, other in (
        (by_tensor(left, E5M2), by_tensor(right, E4M3)),
        (formats.quantize_blocks(left, E4M3, Blocks.ROW), formats.quantize_blocks(right, E4M3, Blocks.TILE)),
    ):
        exact = one.dequantized().double() @ other.dequantized().double()
        found = formats.product(one, other, torch.float32)
        assert torch.allclose(found.double(), exact, rtol=0, atol=3e-6 * float(exact.abs().max()))
        assert formats.product(one, other, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.skipif(not hasattr(torch, "_scaled_mm"), reason="this torch has no scaled product")
def test_a_product_is_that_of_torchs_own_kernel() -> None:
    generator = torch.Generator().manual_seed(7)
    left, right = (by_tensor(torch.randn(1, 64, 64, generator=generator), E4M3) for _ in range(2))
    turned = formats.transposed(right)
    theirs = torch._scaled_mm(
        left.codes[0],
        turned.codes[0].contiguous().t(),
        scale_a=left.scale_inv.view(()),
        scale_b=right.scale_inv.view(()),
        out_dtype=torch.float32,
    )
    assert torch.allclose(formats.product(left, right, torch.float32)[0], theirs, rtol=0, atol=2e-5)


def test_one_outlier_spoils_a_tensor_but_only_its_own_blocks() -> None:
    generator = torch.Generator().manual_seed(8)
    matrix = torch.randn(1, 256, 256, generator=generator)
    matrix[0, 0, 0] = 1e6
    rest = (slice(None), slice(128, None))
    for quantized, bound in (
        (by_tensor(matrix, E4M3), (0.5, 1.1)),
        (formats.quantize_blocks(matrix, E4M3, Blocks.ROW), (0.0, 0.03)),
        (formats.quantize_blocks(matrix, E4M3, Blocks.MX_ROW), (0.0, 0.03)),
    ):
        error = (quantized.dequantized() - matrix)[rest].norm() / matrix[rest].norm()
        assert bound[0] <= float(error) <= bound[1]


def test_a_delayed_scale_meets_a_spike_one_step_late() -> None:
    """Values grow tenfold: that step is cut off at the old amax, the next one is not."""
    generator = torch.Generator().manual_seed(9)
    history, scale, errors = torch.zeros(4, 1), torch.ones(1), []
    for growth in (1.0, 1.0, 10.0, 10.0):
        tensor = growth * torch.randn(1, 128, 128, generator=generator)
        found = formats.quantize_tensor(tensor, scale.view(1, 1, 1), E4M3).dequantized()
        errors.append(float((found - tensor).norm() / tensor.norm()))
        history[0] = formats.amax_of(tensor).view(-1)
        formats.update_delayed(history, scale, torch.tensor([448.0]), margin=0, most_recent=False)
    assert errors[1] < 0.03 and errors[3] < 0.03
    assert errors[2] > 0.4
