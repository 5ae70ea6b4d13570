"""cuDNN's fused attention: which calls it supports, and softmax(q k^T) v by torch for these.

Ragged sequences (`thd`) are processed one by one. Statistics and random states have correct shapes but no values, since
they are never read.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from tests.te_on_cpu.enumerations import (
    MACHINE,
    DType,
    NVTE_Bias_Type,
    NVTE_Fused_Attn_Backend,
    NVTE_Softmax_Type,
)


def get_fused_attn_backend(
    *, q_dtype: DType, kv_dtype: DType, layout: Any, bias: Any, mask: Any, softmax: Any, max_q: int, max_kv: int,
    head_qk: int, head_v: int, window_left: int, window_right: int, return_max_logit: bool, **_: Any,
) -> NVTE_Fused_Attn_Backend:  # fmt: skip
    """cuDNN 9.19 on Hopper, as far as bf16 without bias or window goes."""
    ragged = "THD" in layout.name
    fits = (
        q_dtype == kv_dtype and q_dtype in (DType.kFloat16, DType.kBFloat16)
        and bias == NVTE_Bias_Type.NVTE_NO_BIAS and softmax == NVTE_Softmax_Type.NVTE_VANILLA_SOFTMAX
        and head_qk % 8 == 0 and head_v % 8 == 0 and head_qk <= 256 and head_v <= 256 and not return_max_logit
        and (not ragged or (mask.name.startswith("NVTE_PADDING") and MACHINE.capability >= (9, 0)))
        and ("BOTTOM_RIGHT" not in mask.name or max_q <= max_kv)
        and (window_left, window_right) in ((-1, -1), (-1, 0))
    )  # fmt: skip
    kinds = NVTE_Fused_Attn_Backend
    return kinds.NVTE_F16_arbitrary_seqlen if fits else kinds.NVTE_No_Backend


def _sequences(tensor: Tensor, layout: Any, ends: Tensor) -> list[Tensor]:
    """Every sequence as [H, S, D]."""
    if "THD" in layout.name:
        assert tensor.dim() == 3 and ends.dtype == torch.int32
        marks = ends.tolist()
        return [tensor[begin:end].transpose(0, 1) for begin, end in itertools.pairwise(marks)]
    batch_first = layout.name.startswith("NVTE_BS")
    return [t.transpose(0, 1) for t in (tensor if batch_first else tensor.transpose(0, 1))]


def _attend(q: Tensor, k: Tensor, v: Tensor, layout: Any, mask: Any, scale: float, ends: tuple[Tensor, Tensor]) -> Any:
    out = []
    for one, two, three in zip(
        _sequences(q, layout, ends[0]), _sequences(k, layout, ends[1]), _sequences(v, layout, ends[1]), strict=True
    ):
        if one.shape[1]:
            aligned = causal_lower_right(one.shape[1], two.shape[1]) if "BOTTOM_RIGHT" in mask.name else None
            out.append(
                F.scaled_dot_product_attention(
                    one.unsqueeze(0), two.unsqueeze(0), three.unsqueeze(0), attn_mask=aligned,
                    is_causal=aligned is None and "CAUSAL" in mask.name, scale=scale, enable_gqa=True,
                )[0].transpose(0, 1)
            )  # fmt: skip
    if "THD" in layout.name:
        found = torch.cat(out)
        missing = q.shape[0] - found.shape[0]
        return F.pad(found, (0, 0, 0, 0, 0, missing)) if missing else found
    return torch.stack(out, dim=0 if layout.name.startswith("NVTE_BS") else 1)


def _unpadded(padded: Tensor | None, plain: Tensor) -> None:
    assert padded is None or torch.equal(padded, plain), "te_on_cpu: no padding between sequences"


def _aligned(mask: Any, bottom_right_diagonal: bool | None) -> None:
    """From 2.12 on the diagonal is an argument of its own; kernels obey it, not the mask's name."""
    expected = "BOTTOM_RIGHT" in mask.name
    assert bottom_right_diagonal in (None, expected), (mask.name, bottom_right_diagonal)


def fused_attn_fwd(
    *, attn_scale: float, p_dropout: float, qkv_layout: Any, attn_mask_type: Any, cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor, q: Any, k: Any, v: Any, cu_seqlens_q_padded: Tensor | None,
    cu_seqlens_kv_padded: Tensor | None, s_quantizer: Any, o_quantizer: Any, bias: Tensor | None,
    bottom_right_diagonal: bool | None = None, **_: Any,
) -> list[Any]:  # fmt: skip
    assert p_dropout == 0.0 and s_quantizer is None and o_quantizer is None and bias is None
    _unpadded(cu_seqlens_q_padded, cu_seqlens_q)
    _unpadded(cu_seqlens_kv_padded, cu_seqlens_kv)
    _aligned(attn_mask_type, bottom_right_diagonal)
    with torch.no_grad():
        out = _attend(q, k, v, qkv_layout, attn_mask_type, attn_scale, (cu_seqlens_q, cu_seqlens_kv))
    # Statistics and random state, which are never read.
    return [out.contiguous(), torch.zeros(1), torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    *, attn_scale: float, qkv_layout: Any, attn_mask_type: Any, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, q: Any,
    k: Any, v: Any, d_o: Any, bottom_right_diagonal: bool | None = None, **_: Any,
) -> list[Any]:  # fmt: skip
    _aligned(attn_mask_type, bottom_right_diagonal)
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = _attend(*leaves, qkv_layout, attn_mask_type, attn_scale, (cu_seqlens_q, cu_seqlens_kv))
        found = torch.autograd.grad(out, leaves, d_o.view(out.shape))
    return [*found, None, None]


def convert_thd_to_bshd(tensor: Tensor, cu_seqlens: Tensor, b: int, max_seq_len: int) -> Tensor:
    out = tensor.new_zeros(b, max_seq_len, *tensor.shape[1:])
    marks = cu_seqlens.tolist()
    for index, (begin, end) in enumerate(itertools.pairwise(marks[: b + 1])):
        out[index, : end - begin] = tensor[begin:end]
    return out


def convert_bshd_to_thd(tensor: Tensor, cu_seqlens: Tensor, t: Any) -> Tensor:
    out = tensor.new_zeros(int(t), *tensor.shape[2:])
    marks = cu_seqlens.tolist()
    for index, (begin, end) in enumerate(itertools.pairwise(marks)):
        out[begin:end] = tensor[index, : end - begin]
    return out
