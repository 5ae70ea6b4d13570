"""Core attention of the torch backend: scaled_dot_product_attention, causal, confined to documents.

megatron-core's local DotProductAttention materialises all scores and knows no documents; this one fills the same slot.

Shapes: S tokens, B sequences, H heads of this rank, G key/value heads of this rank, D width of a head.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from mmscale.model.mixed_modal import MixedModalParams


class DocumentAttention(MegatronModule):
    """softmax(q k^T / sqrt(D)) v over earlier tokens of the same document."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, *_: Any, softmax_scale: float | None = None, **__: Any
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: MixedModalParams | None = None,
        **_: Any,
    ) -> Tensor:
        """Attend: query [S, B, H, D], key and value [S, B, G, D] -> [S, B, H * D]."""
        assert attention_mask is None and attention_bias is None, "documents come in packed_seq_params"
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if k.shape[1] != q.shape[1]:
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        bias = None if packed_seq_params is None else packed_seq_params.attention_bias(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None, scale=self.softmax_scale)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)
