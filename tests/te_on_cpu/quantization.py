"""FP8 by formula: scales, casts, tiles of 1 x 128 and 128 x 128, transposes, delayed scaling's update.

Rounding is torch's cast to FP8. Further effects of a GPU kernel (fused transposes, padding of scales) are reproduced
only as far as the package's Python sees them: which tensors are filled, and in which layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.te_on_cpu.enumerations import LARGEST, TORCH_TYPES, DType

_CPU = torch.device("cpu")


def scale_of(amax: Tensor, largest: float, *, epsilon: float = 0.0, power_of_two: bool = False) -> Tensor:
    """The scale of a current-scaling cast, for every amax separately."""
    amax = amax.float().clamp_min(epsilon)
    scale = torch.where(torch.isfinite(amax) & (amax > 0), largest / amax, torch.ones_like(amax))
    scale = torch.where(torch.isinf(scale), torch.full_like(scale, torch.finfo(torch.float32).max), scale)
    if power_of_two:
        bits = scale.view(torch.int32) & 0x7F800000  # the sign is 0; clears the mantissa
        scale = bits.view(torch.float32)
    return scale


def cast(values: Tensor, scale: Tensor | float, dtype: DType) -> Tensor:
    """fp32 times scale, saturated, as bytes of FP8."""
    limit = LARGEST[dtype]
    return (values.float() * scale).clamp(-limit, limit).to(TORCH_TYPES[dtype]).view(torch.uint8)


def uncast(data: Tensor, dtype: DType) -> Tensor:
    """Bytes of FP8 as fp32, unscaled."""
    return data.view(TORCH_TYPES[dtype]).float()


def _turned(data: Tensor) -> Tensor:
    """[..., K] -> [K, ...], the layout of column-wise data."""
    rows = data.reshape(-1, data.shape[-1])
    return rows.t().contiguous().view(data.shape[-1], *data.shape[:-1])


def _blocks(rows: Tensor, quantizer: Any, *, two: bool) -> tuple[Tensor, Tensor]:
    """[M, K] in tiles of 1 x 128 or 128 x 128 -> bytes [M, K], inverse scales [M or tiles, tiles of K]."""
    m, k = rows.shape
    tall, wide = -(-m // 128), -(-k // 128)
    padded = F.pad(rows.float(), (0, wide * 128 - k, 0, (tall * 128 - m) if two else 0))
    tiles = padded.view(tall, 128, wide, 128) if two else padded.view(m, 1, wide, 128)
    amax = tiles.abs().amax(dim=(1, 3))
    scale = scale_of(
        amax,
        LARGEST[quantizer.dtype],
        epsilon=quantizer.amax_epsilon,
        power_of_two=quantizer.force_pow_2_scales,
    )
    data = cast(tiles, scale[:, None, :, None], quantizer.dtype).view(padded.shape)[:m, :k].contiguous()
    return data, scale.reciprocal()


def _put_scales(target: Tensor, scales: Tensor) -> None:
    """Write inverse scales into a tensor that is padded to multiples of four."""
    target.zero_()
    target[: scales.shape[0], : scales.shape[1]] = scales


def _fill_blockwise(values: Tensor, quantizer: Any, out: Any) -> None:
    rows = values.reshape(-1, values.shape[-1])
    two, compact = quantizer.block_scaling_dim == 2, bool(getattr(quantizer, "all_gather_usage", False))
    if two and not compact:
        data, inverse = _blocks(rows, quantizer, two=True)
        if out._rowwise_data is not None:
            out._rowwise_data.copy_(data.view(out._rowwise_data.shape))
            _put_scales(out._rowwise_scale_inv, inverse)
        if out._columnwise_data is not None:
            out._columnwise_data.copy_(_turned(data).view(out._columnwise_data.shape))
            _put_scales(out._columnwise_scale_inv, inverse.t())
        return
    if two:
        raise NotImplementedError("two-dimensional blocks for an all-gather")
    if out._rowwise_data is not None:
        data, inverse = _blocks(rows, quantizer, two=False)
        out._rowwise_data.copy_(data.view(out._rowwise_data.shape))
        _put_scales(out._rowwise_scale_inv, inverse if compact else inverse.t())
    if out._columnwise_data is not None:
        data, inverse = _blocks(rows.t().contiguous(), quantizer, two=False)  # [K, M], [K, tiles of M]
        out._columnwise_data.copy_((data.t() if compact else data).reshape(out._columnwise_data.shape))
        _put_scales(out._columnwise_scale_inv, inverse.t())


def _fill_float8(values: Tensor, quantizer: Any, out: Any, scale: Tensor) -> None:
    data = cast(values, scale, quantizer.dtype)
    if out._data is not None:
        out._data.copy_(data.view(out._data.shape))
    if out._transpose is not None:
        out._transpose.copy_(_turned(data.view(values.shape)).view(out._transpose.shape))
        out._transpose_invalid = False
    out._scale_inv.copy_(scale.reciprocal().view(out._scale_inv.shape))
    out._fp8_dtype = quantizer.dtype


def _empty_of(quantizer: Any, shape: Any, dtype: torch.dtype) -> Any:
    """An unfilled quantised tensor; a plain holder of data if the quantiser is internal."""
    made = quantizer.make_empty(shape, dtype=dtype, device=_CPU)
    if not quantizer.internal:
        return made
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import (
        Float8BlockwiseQTensorStorage,
    )
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    kind = Float8BlockwiseQTensorStorage if isinstance(quantizer, Float8BlockQuantizer) else Float8TensorStorage
    return kind(**made.get_metadata())


def _current_scale(values: Tensor, quantizer: Any) -> Tensor:
    """Of the values themselves. Quantisers keep amax and scale up to 2.15."""
    kept = getattr(quantizer, "amax", None)
    if getattr(quantizer, "use_existing_amax", False):
        amax = kept
    else:
        amax = values.float().abs().max().view(1) if values.numel() else torch.zeros(1)
    if quantizer.with_amax_reduction:
        group = quantizer._canonicalized_amax_reduction_group()
        torch.distributed.all_reduce(amax, op=torch.distributed.ReduceOp.MAX, group=group)
    scale = scale_of(
        amax,
        LARGEST[quantizer.dtype],
        epsilon=quantizer.amax_epsilon,
        power_of_two=quantizer.force_pow_2_scales,
    )
    if kept is not None:
        kept.copy_(amax)
        quantizer.scale.copy_(scale)
    return scale


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    if quantizer is None:
        return tensor
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Quantizer

    if noop is not None and bool(noop.item()):
        return output
    values = tensor.detach().contiguous()
    out = _empty_of(quantizer, values.shape, values.dtype) if output is None else output
    with torch.no_grad():
        if isinstance(quantizer, Float8Quantizer):
            if values.numel():
                torch.maximum(quantizer.amax, values.float().abs().max().view(1), out=quantizer.amax)
            _fill_float8(values, quantizer, out, quantizer.scale.view(1))
        elif isinstance(quantizer, Float8CurrentScalingQuantizer):
            _fill_float8(values, quantizer, out, _current_scale(values, quantizer))
        elif isinstance(quantizer, Float8BlockQuantizer):
            _fill_blockwise(values, quantizer, out)
        else:
            raise NotImplementedError(f"te_on_cpu quantises nothing with {type(quantizer).__name__}")
    return out


def create_empty_quantized_tensor(
    quantizer: Any, shape: list[int], dtype: torch.dtype, device: torch.device, pin_memory: bool
) -> Any:
    """An unfilled quantised tensor: what `make_empty` of 2.16 and later calls."""
    del device, pin_memory
    from transformer_engine.pytorch.tensor import float8_blockwise_tensor as blockwise
    from transformer_engine.pytorch.tensor import float8_tensor as plain

    def empty(sizes: Any, kind: torch.dtype = torch.uint8) -> Tensor:
        return torch.empty(tuple(sizes), dtype=kind)

    rows, columns = quantizer.rowwise_usage, quantizer.columnwise_usage
    common = {"shape": shape, "dtype": dtype, "fp8_dtype": quantizer.dtype, "quantizer": quantizer}
    if isinstance(quantizer, blockwise.Float8BlockQuantizer):
        scales = [quantizer.get_scale_shape(shape, columnwise=turned) for turned in (False, True)]
        return blockwise.Float8BlockwiseQTensor(
            rowwise_data=empty(shape) if rows else None,
            rowwise_scale_inv=empty(scales[0], torch.float32) if rows else None,
            columnwise_data=empty(quantizer.get_columnwise_shape(shape)) if columns else None,
            columnwise_scale_inv=empty(scales[1], torch.float32) if columns else None,
            is_2D_scaled=quantizer.block_scaling_dim == 2,
            **common,
        )
    return plain.Float8Tensor(
        data=empty(shape) if rows else None,
        data_transpose=empty((shape[-1], *shape[:-1])) if columns else None,
        fp8_scale_inv=empty((1,), torch.float32),
        **common,
    )


def split_quantize(
    tensor: Tensor, split_sections: Any, quantizer_list: Any, disable_bulk_allocation: bool = False
) -> list[Any]:
    assert tensor.dim() >= 1 and len(split_sections) == len(quantizer_list)
    parts = zip(tensor.split(list(split_sections)), quantizer_list, strict=True)
    return [quantize(part, quantizer) for part, quantizer in parts]


def bgrad_quantize(input: Tensor, quantizer: Any) -> list[Any]:
    return [input.reshape(-1, input.shape[-1]).sum(0), quantize(input, quantizer)]


def dequantize(input: Any, otype: DType) -> Tensor:
    return (uncast(input._data, input._fp8_dtype) * input._scale_inv).to(TORCH_TYPES[otype])


def fp8_transpose(input: Tensor, dtype: DType, *, out: Tensor | None) -> Tensor:
    turned = _turned(input)
    if out is None:
        return turned
    out.copy_(turned.view(out.shape))
    return out


def compute_amax(input: Tensor, amax: Tensor) -> None:
    amax.copy_(input.float().abs().max().view(amax.shape))


def fused_amax_and_scale_update_after_reduction(
    reduced: Tensor, histories: Any, scales: Any, algorithm: str, dtype: DType, margin: float
) -> None:
    assert algorithm in ("max", "most_recent"), algorithm
    newest = reduced.split([h.shape[1] for h in histories])
    for history, scale, latest in zip(histories, scales, newest, strict=True):
        history[0].copy_(latest)
        amax = history.amax(0) if algorithm == "max" else history[0].clone()
        history.copy_(history.roll(-1, 0))
        history[0].zero_()
        found = (LARGEST[dtype] / amax) / (2.0**margin)
        found = torch.where(amax > 0, found, scale)
        found = torch.where(torch.isfinite(amax), found, scale)
        found = torch.where(torch.isinf(found), torch.full_like(found, torch.finfo(torch.float32).max), found)
        scale.copy_(found)
