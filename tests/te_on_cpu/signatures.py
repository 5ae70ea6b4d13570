"""Arguments of the compiled functions of fused attention, whose order each version of Transformer-Engine changes.

The package calls them by position. Here positions become names, so that one implementation serves all versions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from packaging.version import Version

# Each name may be followed by the first version that passes it and the first one that no longer does.
_BACKEND = """
    is_training q_dtype kv_dtype layout bias mask softmax dropout heads groups max_q max_kv head_qk head_v window_left
    window_right return_max_logit cuda_graph:2.10 deterministic:2.12
"""
_FORWARD = """
    max_seqlen_q max_seqlen_kv is_training attn_scale p_dropout set_zero qkv_layout o_format:2.15
    qkv_scale_inv_format:2.15 bias_type attn_mask_type softmax_type window_size bottom_right_diagonal:2.12 cu_seqlens_q
    cu_seqlens_kv q k v fake_dtype cu_seqlens_q_padded cu_seqlens_kv_padded page_table_k page_table_v s_quantizer
    o_quantizer bias softmax_offset rng_gen rng_elts_per_thread return_max_logit cuda_graph:2.10
"""
_BACKWARD = """
    max_seqlen_q max_seqlen_kv attn_scale p_dropout set_zero qkv_layout o_format:2.15 do_format:2.15 dqkv_layout:2.15
    qkv_scale_inv_format:2.15 do_scale_inv_format:2.15 bias_type attn_mask_type softmax_type window_size
    bottom_right_diagonal:2.12 deterministic cu_seqlens_q cu_seqlens_kv q k v o d_o fake_dtype dqkv_type:2.9:2.15
    aux_ctx_tensors cu_seqlens_q_padded cu_seqlens_kv_padded s_quantizer dp_quantizer dqkv_quantizer cuda_graph:2.10
"""
_NAMES = {"get_fused_attn_backend": _BACKEND, "fused_attn_fwd": _FORWARD, "fused_attn_bwd": _BACKWARD}
_FIELDS = {  # of FusedAttentionParams, which replaces the arguments of get_fused_attn_backend from 2.20 on
    "q_dtype": "qkv_dtype", "kv_dtype": "qkv_dtype", "layout": "qkv_layout", "bias": "bias_type",
    "mask": "attn_mask_type", "softmax": "softmax_type", "heads": "num_attn_heads", "groups": "num_gqa_groups",
    "max_q": "max_seqlen_q", "max_kv": "max_seqlen_kv", "head_qk": "head_dim_qk", "head_v": "head_dim_v",
    "window_left": "window_size_left", "window_right": "window_size_right",
}  # fmt: skip
BY_NAME = tuple(_NAMES)


def named(function: Callable[..., Any], version: Version) -> Callable[..., Any]:
    """The function of attention.py, which takes arguments by name, as this version of Transformer-Engine calls it."""
    names = _names(_NAMES[function.__name__], version)
    if function.__name__ == "get_fused_attn_backend" and version >= Version("2.20"):
        return _of_parameters(function, names)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return function(**dict(zip(names, args, strict=True)))

    return call


def _of_parameters(function: Callable[..., Any], names: list[str]) -> Callable[..., Any]:
    """One object instead of arguments, with numbers of tokens for ragged sequences; a reason beside the result."""

    @functools.wraps(function)
    def call(asked: Any) -> Any:
        ragged = "THD" in asked.qkv_layout.name
        assert not ragged or (asked.num_tokens_q and asked.num_tokens_kv), "thd without its numbers of tokens"
        return function(**{name: getattr(asked, _FIELDS.get(name, name)) for name in names}), ""

    return call


def _names(listed: str, version: Version) -> list[str]:
    found = []
    for entry in listed.split():
        name, *bounds = entry.split(":")
        first, last = (*bounds, "0", "999")[:2] if len(bounds) != 1 else (bounds[0], "999")
        if Version(first) <= version < Version(last):
            found.append(name)
    return found
