"""cuDNN's fused attention: which calls it supports, and attention by formula for these.

Ragged sequences (`thd`) are processed one by one. Like the kernels, backward computes probabilities from the statistics
and the output that it is given, which are not those of its own keys if a ring passes a part of them. The random state
has the correct shape but no values, since it is never read.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

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


def _joined(found: list[Tensor], like: Tensor, layout: Any) -> Tensor:
    """The opposite of `_sequences`: [H, S, D] of every sequence -> a tensor of the shape of `like`, up to D."""
    parts = [part.transpose(0, 1) for part in found]
    if "THD" in layout.name:
        joined = torch.cat(parts)
        missing = like.shape[0] - joined.shape[0]
        return torch.cat((joined, joined.new_zeros(missing, *joined.shape[1:]))).contiguous()
    return torch.stack(parts, dim=0 if layout.name.startswith("NVTE_BS") else 1).contiguous()


def _scores(q: Tensor, k: Tensor, mask: Any, scale: float) -> Tensor:
    """fp32 [H, queries, keys], -inf where the mask hides a key; k has the heads of q."""
    scores = scale * q @ k.transpose(1, 2)
    if "CAUSAL" in mask.name:
        queries, keys = scores.shape[1:]
        last = keys - queries if "BOTTOM_RIGHT" in mask.name else 0  # key of the first query
        hidden = torch.arange(keys) > torch.arange(queries).unsqueeze(1) + last
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores


def _repeated(tensor: Tensor, heads: int) -> Tensor:
    return tensor.float().repeat_interleave(heads // tensor.shape[0], dim=0)


def _no_padding(*pairs: tuple[Tensor | None, Tensor]) -> None:
    for padded, plain in pairs:
        assert padded is None or torch.equal(padded, plain), "te_on_cpu: no padding between sequences"


def _aligned(mask: Any, bottom_right_diagonal: bool | None) -> None:
    """From 2.12 on the diagonal is an argument of its own; kernels obey it, not the mask's name."""
    expected = "BOTTOM_RIGHT" in mask.name
    assert bottom_right_diagonal in (None, expected), (mask.name, bottom_right_diagonal)


def fused_attn_fwd(
    *, max_seqlen_q: int, max_seqlen_kv: int, attn_scale: float, p_dropout: float, qkv_layout: Any,
    attn_mask_type: Any, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, q: Any, k: Any, v: Any,
    cu_seqlens_q_padded: Tensor | None, cu_seqlens_kv_padded: Tensor | None, s_quantizer: Any, o_quantizer: Any,
    bias: Tensor | None, bottom_right_diagonal: bool | None = None, **_: Any,
) -> list[Any]:  # fmt: skip
    """Returns the output, log(sum(exp)) of every query, and a random state."""
    assert p_dropout == 0.0 and s_quantizer is None and o_quantizer is None and bias is None
    _no_padding((cu_seqlens_q_padded, cu_seqlens_q), (cu_seqlens_kv_padded, cu_seqlens_kv))
    _aligned(attn_mask_type, bottom_right_diagonal)
    _within(cu_seqlens_q, max_seqlen_q, qkv_layout)
    _within(cu_seqlens_kv, max_seqlen_kv, qkv_layout)
    outputs, statistics = [], []
    for one, two, three in _triples(qkv_layout, (cu_seqlens_q, cu_seqlens_kv), q, k, v):
        scores = _scores(one.float(), _repeated(two, len(one)), attn_mask_type, attn_scale)
        statistics.append(scores.logsumexp(dim=-1, keepdim=True))
        outputs.append((torch.exp(scores - statistics[-1]) @ _repeated(three, len(one))).to(q.dtype))
    logs = _joined(statistics, q, qkv_layout) if "THD" in qkv_layout.name else torch.stack(statistics)
    return [_joined(outputs, q, qkv_layout), logs, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    *, attn_scale: float, qkv_layout: Any, attn_mask_type: Any, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, q: Any,
    k: Any, v: Any, o: Any, d_o: Any, aux_ctx_tensors: Any, cu_seqlens_q_padded: Tensor | None,
    cu_seqlens_kv_padded: Tensor | None, bottom_right_diagonal: bool | None = None, **_: Any,
) -> list[Any]:  # fmt: skip
    """Returns gradients of queries, keys and values, and none of bias and softmax offset."""
    _no_padding((cu_seqlens_q_padded, cu_seqlens_q), (cu_seqlens_kv_padded, cu_seqlens_kv))
    _aligned(attn_mask_type, bottom_right_diagonal)
    ends = (cu_seqlens_q, cu_seqlens_kv)
    outputs, gradients = (_sequences(tensor.view(q.shape), qkv_layout, ends[0]) for tensor in (o, d_o))
    logs = aux_ctx_tensors[0]
    logs = _sequences(logs, qkv_layout, ends[0]) if "THD" in qkv_layout.name else list(logs)
    found: tuple[list[Tensor], ...] = ([], [], [])
    triples = _triples(qkv_layout, ends, q, k, v)
    for (one, two, three), own, do, log in zip(triples, outputs, gradients, logs, strict=True):
        keys, values, do = _repeated(two, len(one)), _repeated(three, len(one)), do.float()
        shares = torch.exp(_scores(one.float(), keys, attn_mask_type, attn_scale) - log)
        ds = shares * (do @ values.transpose(1, 2) - (do * own.float()).sum(-1, keepdim=True)) * attn_scale
        by_head = (ds @ keys, ds.transpose(1, 2) @ one.float(), shares.transpose(1, 2) @ do)
        for tensor, gradient, like in zip(found, by_head, (one, two, three), strict=True):
            tensor.append(gradient.unflatten(0, (len(like), len(one) // len(like))).sum(1).to(q.dtype))
    return [*(_joined(one, like, qkv_layout) for one, like in zip(found, (q, k, v), strict=True)), None, None]


def _triples(layout: Any, ends: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor) -> Any:
    """Queries, keys and values of every sequence."""
    return zip(
        _sequences(q, layout, ends[0]), _sequences(k, layout, ends[1]), _sequences(v, layout, ends[1]), strict=True
    )


def _within(ends: Tensor, longest: int, layout: Any) -> None:
    if "THD" in layout.name:
        assert int(ends.diff().max()) <= longest, "a sequence is longer than the kernel was told"


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
