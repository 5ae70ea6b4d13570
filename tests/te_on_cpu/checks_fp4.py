"""NVFP4's formulas against Transformer-Engine's own reference in Python, number by number."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from mmscale.model import fp4_formats as fp4
from mmscale.model.fp8_formats import Blocks, Quantized, amax_of

# Where releases have the reference: 2.9, 2.10 to 2.15, 2.16 to 2.18, 2.19 and later.
HOMES = (
    "experimental.quantization_nvfp4",
    "custom_recipes.quantization_nvfp4",
    "custom_recipes.quantization_ref_nvfp4",
    "custom_recipes.reference_nvfp4",
)


def _there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its package is not there
        return False


(HOME,) = (name for home in HOMES if _there(name := f"transformer_engine.pytorch.{home}"))
reference: Any = importlib.import_module(HOME)


def _codes(packed: Tensor) -> Tensor:
    codes: Tensor = reference.cast_from_fp4x2(packed, torch.float32)
    return codes


# Newer references multiply amax with 2688 / 6 / amax of the tensor, instead of dividing it by 6 first. The last bit of
# this may decide to which of two E4M3 numbers a scale is rounded.
OTHER_ORDER = "global_encode_scale_multiplier" in inspect.getsource(reference)


def _assert_same(codes: Tensor, scales: Tensor, amax: Tensor, found: Quantized) -> None:
    rows = found.scale_inv[0]
    wide = rows.repeat_interleave(16, dim=0) if len(rows) * 16 == len(codes) else rows  # it repeats those of tiles
    same = scales.float() == wide
    assert same.all() or (
        OTHER_ORDER and same.float().mean() > 0.98 and torch.allclose(scales.float(), wide, rtol=0.13)
    )
    equal = _codes(codes) == found.codes[0].float()
    assert equal[same.repeat_interleave(16, dim=1)].all()
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
        quantizer = reference.NVFP4QuantizerRef(None, quant_tile_shape=tile, with_rht=rotate)
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
    matrix = reference.NVFP4QuantizerRef._build_hadamard_matrix(16, torch.device("cpu"), torch.float32)
    assert torch.equal(fp4.rotation(), matrix / 4)
