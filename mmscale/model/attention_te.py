"""Core attention through Transformer-Engine, with documents as ragged sequences.

Imported only if Transformer-Engine is installed. Not used for fp32, nor if Transformer-Engine has no fused kernel for
ragged sequences; then attention.py's class fills the slot.

Shapes: S tokens, B sequences, H heads of this rank, G key/value heads of this rank, D width of a head.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mmscale.model.mixed_modal import MixedModalParams

_PACKAGE = "transformer_engine.pytorch.attention.dot_product_attention"
_LENGTH, _DOCUMENTS = 4096, 64  # of a typical micro-batch; whether a kernel exists does not depend on them


def takes_documents(transformer: TransformerConfig) -> bool:
    """Whether Transformer-Engine has a fused kernel for this model's heads and ragged sequences on this machine.

    Without a fused kernel Transformer-Engine would materialise scores of [documents, H, S, S]. That happens below
    compute capability 9.0, where cuDNN does not support ragged sequences, if flash-attn is not installed. The function
    asks Transformer-Engine itself, so that its environment variables and its version are taken into account.
    """
    if not transformer.bf16:
        return False  # the kernels take no fp32
    utils: Any = importlib.import_module(f"{_PACKAGE}.utils")
    tp = transformer.tensor_model_parallel_size
    asked = utils.AttentionParams(
        qkv_dtype=torch.bfloat16,
        qkv_layout="thd_thd_thd",
        batch_size=_DOCUMENTS,
        num_heads=transformer.num_attention_heads // tp,
        num_gqa_groups=max(1, (transformer.num_query_groups or transformer.num_attention_heads) // tp),
        max_seqlen_q=_LENGTH,
        max_seqlen_kv=_LENGTH,
        head_dim_qk=transformer.kv_channels,
        head_dim_v=transformer.kv_channels,
        attn_mask_type="padding_causal",
        window_size=(-1, 0),
        core_attention_bias_shape=None,
        core_attention_bias_requires_grad=False,
        fp8_meta={},
    )
    flash, _, fused, *_ = utils.get_attention_backend(asked)
    return bool(flash or fused)


_choices: dict[tuple[Any, ...], dict[str, Any]] = {}  # stays small, because the numbers of documents are rounded


@contextlib.contextmanager
def _known_choice(key: tuple[Any, ...]) -> Iterator[None]:
    """Inside, Transformer-Engine uses the backend that it chose for the last call with this key.

    Transformer-Engine caches one choice for all modules and makes a new one when the number of sequences or their
    length changes. Mixture-of-Depths layers differ in both from the layers around them, so without this function every
    call would choose again. Transformer-Engine still compares all parameters, so an unsuitable choice is never used.
    """
    kept: dict[str, Any] = importlib.import_module(f"{_PACKAGE}.dot_product_attention")._attention_backends
    if key in _choices:
        kept.update(_choices[key])
    try:
        yield
    finally:
        _choices[key] = dict(kept)


class FusedDocumentAttention(TEDotProductAttention):
    """Fused attention over documents as separate sequences, without computing masked parts."""

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
        if packed_seq_params is None:
            return super().forward(query, key, value, None, AttnMaskType.causal)
        length, batch = query.shape[:2]
        ends = packed_seq_params.document_ends()
        # The `thd` layout needs the tokens of a sequence next to each other; with one sequence nothing is copied.
        flat = [tensor.transpose(0, 1).reshape(length * batch, *tensor.shape[2:]) for tensor in (query, key, value)]
        documents = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=length, max_seqlen_kv=length
        )
        with _known_choice((len(ends), length, self.training)):
            out = super().forward(*flat, None, AttnMaskType.padding_causal, packed_seq_params=documents)
        return out.view(batch, length, -1).transpose(0, 1)
