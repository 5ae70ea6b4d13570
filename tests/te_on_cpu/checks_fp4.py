"""NVFP4's formulas against Transformer-Engine's own reference in Python, number by number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_engine.pytorch.custom_recipes import quantization_nvfp4 as reference
from transformer_engine.pytorch.custom_recipes import utils
from transformer_engine.pytorch.tensor.nvfp4_tensor import get_rht_matrix

from mmscale.model import fp4_formats as fp4
from mmscale.model.fp8_formats import Blocks, Quantized, amax_of


def _codes(packed: Tensor) -> Tensor:
    return reference.cast_from_fp4x2(packed, torch.float32)


def _assert_same(codes: Tensor, scales: Tensor, amax: Tensor, found: Quantized) -> None:
    assert torch.equal(_codes(codes), found.codes[0].float())
    rows = found.scale_inv[0]
    wide = rows.repeat_interleave(16, dim=0) if len(rows) * 16 == len(codes) else rows  # it repeats those of tiles
    assert torch.equal(scales.float(), wide)
    assert found.factor is not None and torch.equal(amax / 2688.0, found.factor.view(1))


@pytest.mark.parametrize("size", [1.0, 1e-20, 3e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_scales_are_the_references(size: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    tensor = (torch.randn(64, 96, generator=generator) * size).to(dtype)
    tensor[:16, :16], tensor[40, 50] = 0.0, 200.0 * size
    for tile, rotate, blocks in (
        ((1, 16), False, (Blocks.FP4_ROW, Blocks.FP4_COLUMN)),
        ((1, 16), True, (Blocks.FP4_ROW, Blocks.FP4_ROTATED)),
        ((16, 16), False, (Blocks.FP4_TILE, Blocks.FP4_TILE)),
    ):
        quantizer = reference.NVFP4QuantizerRef(utils.Fp4Formats.E2M1, quant_tile_shape=tile, with_rht=rotate)
        row, row_scales, column, column_scales, row_amax, column_amax = quantizer._quantize(tensor)
        across = fp4.quantize(tensor.unsqueeze(0), amax_of(tensor.unsqueeze(0)), blocks[0])
        _assert_same(row, row_scales, row_amax, across)
        turned = tensor.t().contiguous().unsqueeze(0)
        if rotate:  # the reference adds up in another order
            own = fp4.rotated(tensor.unsqueeze(0))
            theirs = quantizer._apply_rht(turned[0])
            assert torch.allclose(own[0].t().float(), theirs.float(), rtol=2e-2, atol=1e-2 * float(theirs.abs().max()))
            turned = theirs.unsqueeze(0)
        down = fp4.quantize(turned, amax_of(turned), Blocks.FP4_TILE if tile == (16, 16) else Blocks.FP4_ROW)
        _assert_same(column, column_scales, column_amax, down)


def test_the_rotation_is_the_references() -> None:
    matrix: Any = get_rht_matrix(True, torch.device("cpu"))
    assert torch.equal(fp4.rotation().bfloat16(), matrix)
