"""NVFP4 in formulas, against the same written down number by number."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from mmscale.model import fp4_formats as fp4
from mmscale.model import fp8_formats as formats
from mmscale.model.fp8_emulate import Fp8Product
from mmscale.model.fp8_formats import E4M3, Blocks
from mmscale.model.fp8_recipe import Recipe
from mmscale.train.steps.fp8_scales import RoundingSteps
from tests.unit.model.comparison import relative

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of E2M1, by code
ONE, LARGEST, LARGEST_SCALE = np.float32(1.0), np.float32(6.0), np.float32(448.0)
FP32_MAX = np.finfo(np.float32).max


def nearest(value: float) -> float:
    """The nearest value of E2M1, of two as near the one with the even code."""
    size = min(abs(value), VALUES[-1])
    best = min(range(len(VALUES)), key=lambda code: (abs(VALUES[code] - size), code % 2))
    return math.copysign(VALUES[best], value)


def block_by_hand(block: np.ndarray, amax: np.float32) -> tuple[np.ndarray, float]:
    """Codes and E4M3 scale of the values that share one, by Transformer-Engine's reference, in numpy's fp32."""
    with np.errstate(all="ignore"):
        encode = min(LARGEST_SCALE * LARGEST / amax, FP32_MAX)
        encode = ONE if encode == 0 else encode
        decode = min(np.abs(block).max() / LARGEST * encode, LARGEST_SCALE)
        decode = np.float32(torch.tensor(decode).to(E4M3).float())
        scale = min(ONE / (decode * (ONE / encode)), FP32_MAX)
    codes = [nearest(float(np.clip(value * scale, -LARGEST, LARGEST))) for value in block.ravel()]
    return np.array(codes).reshape(block.shape), float(decode)


def quantized_by_hand(matrix: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Codes [M, K] and scales of blocks."""
    (rows, columns), amax = shape, np.abs(matrix).max()
    codes = np.zeros_like(matrix)
    scales = np.zeros((-(-matrix.shape[0] // rows), -(-matrix.shape[1] // columns)))
    for down, across in itertools.product(*map(range, scales.shape)):
        place = (slice(down * rows, (down + 1) * rows), slice(across * columns, (across + 1) * columns))
        codes[place], scales[down, across] = block_by_hand(matrix[place], amax)
    return codes, scales


@pytest.mark.parametrize("blocks", [Blocks.FP4_ROW, Blocks.FP4_COLUMN, Blocks.FP4_TILE])
@pytest.mark.parametrize(("size", "dtype"), [(1.0, torch.float32), (1e-30, torch.float32), (1e4, torch.bfloat16)])
def test_codes_and_scales_by_hand(blocks: Blocks, size: float, dtype: torch.dtype) -> None:
    """Also where a block is zero or has an outlier, and at an edge that cuts blocks off."""
    tensor = torch.randn(2, 40, 56, generator=torch.Generator().manual_seed(3)) * size
    tensor[0, :16, :16] = 0.0
    tensor[0, 20, 20], tensor[1] = 300.0 * size, tensor[1].abs() * 1e-3
    tensor = tensor.to(dtype)
    found = fp4.quantize(tensor, formats.amax_of(tensor), blocks)
    for index in range(2):
        matrix = tensor[index].float().numpy()
        codes, scales = quantized_by_hand(matrix, blocks.shape)
        assert np.array_equal(found.codes[index].float().numpy(), codes)
        assert np.array_equal(found.scale_inv[index].numpy(), scales)
        assert found.factor is not None
        assert found.factor[index].item() == np.abs(matrix).max() / np.float32(2688.0)


def test_a_tensor_of_zeros_and_one_without_values() -> None:
    for tensor in (torch.zeros(1, 16, 16), torch.zeros(1, 0, 16)):
        found = fp4.quantize(tensor, formats.amax_of(tensor), Blocks.FP4_ROW)
        assert torch.equal(found.dequantized() * found.factor, tensor)


def test_what_is_not_finite_stays_so() -> None:
    for value in (math.inf, math.nan):
        tensor = torch.ones(1, 16, 16)
        tensor[0, 3, 4] = value
        found = fp4.quantize(tensor, formats.amax_of(tensor), Blocks.FP4_ROW)
        assert not torch.isfinite(found.dequantized() * found.factor).all()


def test_rounding_to_nearest() -> None:
    values = torch.arange(-6 * 64, 6 * 64 + 1) / 64.0  # all ties are among them
    assert fp4.rounded(values).tolist() == [nearest(value) for value in values.tolist()]


def test_stochastic_rounding_takes_neighbours_without_bias() -> None:
    tensor = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(5))
    amax = formats.amax_of(tensor)
    plain = fp4.quantize(tensor, amax, Blocks.FP4_ROW)
    steps = 400
    total = torch.zeros_like(tensor)
    for step in range(steps):
        one = fp4.quantize(tensor, amax, Blocks.FP4_ROW, dice=fp4.Dice(7, step))
        assert torch.equal(one.scale_inv, plain.scale_inv) and set(one.codes.float().abs().unique().tolist()) <= {
            *VALUES
        }
        total += one.codes.float()
    exact = tensor.view(1, 64, 4, 16) / plain.scale_inv.unsqueeze(-1) / amax * 2688.0
    inside = exact.abs() <= 6.0  # a block's scale is rounded, so its largest value may be cut off
    error = (total.view_as(exact) / steps - exact)[inside]
    assert error.abs().max() < 6 * 1.0 / math.sqrt(steps)  # a deviation is at most half a gap of 2
    assert abs(error.mean()) < 3 * 0.5 / math.sqrt(steps * error.numel())


def test_random_numbers_do_not_depend_on_the_layout() -> None:
    """Each shard of rows and columns is rounded as in the whole; another step, or another seed, is not."""
    tensor = torch.randn(1, 64, 128, generator=torch.Generator().manual_seed(6))
    amax = formats.amax_of(tensor)

    def codes(part: Tensor, dice: fp4.Dice, blocks: Blocks = Blocks.FP4_ROW) -> Tensor:
        return fp4.quantize(part, amax, blocks, dice=dice).codes.float()

    dice = fp4.Dice(1, 2)
    for blocks in (Blocks.FP4_ROW, Blocks.FP4_COLUMN):
        whole = codes(tensor, dice, blocks)
        assert torch.equal(whole[:, :, 64:], codes(tensor[:, :, 64:], dice, blocks))
        assert torch.equal(whole[:, 16:48], codes(tensor[:, 16:48], dice, blocks))
    for other in (fp4.Dice(1, 3), fp4.Dice(2, 2)):
        assert 0.2 < (codes(tensor, dice) != codes(tensor, other)).float().mean() < 0.6


def test_the_rotation_changes_no_product() -> None:
    matrix = fp4.rotation()
    assert torch.equal(matrix.abs(), torch.full((16, 16), 0.25))
    assert torch.allclose(matrix @ matrix.t(), torch.eye(16), atol=1e-6)
    left, right = torch.randn(2, 64, 48), torch.randn(2, 64, 32)
    wanted = left.transpose(1, 2) @ right
    assert relative(fp4.rotated(left).transpose(1, 2) @ fp4.rotated(right), wanted) < 1e-6
    by_hand = torch.zeros_like(left)
    for group, column in itertools.product(range(4), range(16)):
        for row in range(16):
            by_hand[:, 16 * group + column] += matrix[row, column] * left[:, 16 * group + row]
    assert torch.allclose(fp4.rotated(left), by_hand, atol=1e-5)


def dequantized(tensor: Tensor, blocks: Blocks, dice: fp4.Dice | None = None) -> Tensor:
    """What is left of a matrix [M, K] in NVFP4, fp64."""
    found = fp4.quantize(tensor, formats.amax_of(tensor), blocks, dice=dice)
    return found.dequantized().double() * found.factor


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("hadamard", [False, True])
def test_the_three_products_of_a_linear(
    process_groups: ProcessGroupCollection, stochastic: bool, hadamard: bool
) -> None:
    generator = torch.Generator().manual_seed(8)
    rows, weight, grad = (torch.randn(2, *s, generator=generator) for s in ((64, 160), (160, 32), (64, 32)))
    rows[0, 3, 5] = 30.0
    rows.requires_grad_()
    weight.requires_grad_()
    recipe = Recipe("nvfp4", stochastic=stochastic, hadamard=hadamard, seed=3)
    product = Fp8Product(recipe, process_groups, count=2, name="a")
    RoundingSteps([product], per_step=4).begin([_Numbered(11)])  # type: ignore[list-item]
    output = product(rows, weight)
    output.backward(grad)
    dice = fp4.Dice(product._seed, 2) if stochastic else None
    for index in range(2):
        x, w, g = (tensor[index].detach() for tensor in (rows, weight, grad))
        tile = dequantized(w, Blocks.FP4_TILE)
        across, down = (fp4.rotated(x), fp4.rotated(g)) if hadamard else (x, g)
        column = Blocks.FP4_COLUMN
        wanted: Any = (
            (output, dequantized(x, Blocks.FP4_ROW) @ tile),
            (rows.grad, dequantized(g, Blocks.FP4_ROW, dice) @ tile.t()),
            (weight.grad, dequantized(across, column).t() @ dequantized(down, column, dice)),
        )
        for found, value in wanted:
            assert relative(found[index], value) < 2e-6


def test_the_error_of_a_product() -> None:
    """Of normal values, 256 x 256 x 256: nearest 0.147, rows stochastic 0.177; FP8 has 0.038."""
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(1, 256, 256, generator=generator) for _ in range(2))
    right = fp4.quantize(weight, formats.amax_of(weight), Blocks.FP4_TILE)
    for dice, most in ((None, 0.15), (fp4.Dice(1, 1), 0.18)):
        left = fp4.quantize(rows, formats.amax_of(rows), Blocks.FP4_ROW, dice=dice)
        found, exact = formats.product(left, right, torch.float32), rows @ weight
        assert most - 0.01 < float((found - exact).norm() / exact.norm()) < most


class _Numbered:
    """A batch that has nothing but its number."""

    def __init__(self, number: int) -> None:
        self.params = self
        self.noise_key = number
