"""Core attention through Transformer-Engine, with documents as ragged sequences.

Imported only if Transformer-Engine is installed. Not used for fp32, nor if Transformer-Engine has no fused kernel for
ragged sequences; then attention.py's class fills the slot.

With context parallelism `parallel.cp_attention` selects the class. `FusedDocumentAttention` gathers keys and values;
the ragged sequences are a rank's pieces of documents (ragged.py). `RingDocumentAttention` is Transformer-Engine's own
context parallelism, which sends keys and values around a ring: it takes documents that are split in this way, but not
the sequences of Mixture-of-Depths layers.

Shapes: S tokens of a sequence, N = S / CP tokens of this rank, B sequences, H heads of this rank, G key/value heads of
this rank, D width of a head, K keys of all pieces.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mmscale.errors import DataError
from mmscale.model.mixed_modal import MixedModalParams
from mmscale.runtime import transformer_engine

_PACKAGE = "transformer_engine.pytorch.attention.dot_product_attention"
_DOCUMENTS_MASK, _PIECES = "padding_causal", "padding_causal_bottom_right"
_RING = "p2p"  # Transformer-Engine's name
_MOST_IN_A_RING = 12_287  # documents, whose ends its kernels keep in 48 KiB of shared memory (context_parallel.cu)
_LENGTH, _DOCUMENTS = 4096, 64  # of a typical micro-batch; whether a kernel exists does not depend on them


def takes_documents(transformer: TransformerConfig, *, ring: bool = False) -> bool:
    """Whether Transformer-Engine has a fused kernel for this model's heads and ragged sequences on this machine.

    Args:
        transformer: heads and layout.
        ring: with its own context parallelism.

    Without a fused kernel Transformer-Engine would materialise scores of [documents, H, S, S]. That happens below
    compute capability 9.0, where cuDNN does not support ragged sequences, if flash-attn is not installed. The function
    asks Transformer-Engine itself, so that its environment variables and its version are taken into account.
    """
    if not transformer.bf16:
        return False  # the kernels take no fp32
    utils: Any = importlib.import_module(f"{_PACKAGE}.utils")
    tp, cp = transformer.tensor_model_parallel_size, transformer.context_parallel_size
    pieces = cp > 1 and not ring
    queries = _LENGTH // cp if pieces else _LENGTH
    newer = transformer_engine.known_fields(
        utils.AttentionParams,
        bottom_right_diagonal=pieces,  # since 2.12
        num_tokens_q=queries,  # since 2.20, for ragged sequences
        num_tokens_kv=_LENGTH,
    )
    asked = utils.AttentionParams(
        qkv_dtype=torch.bfloat16,
        qkv_layout="thd_thd_thd",
        batch_size=_DOCUMENTS,
        num_heads=transformer.num_attention_heads // tp,
        num_gqa_groups=max(1, (transformer.num_query_groups or transformer.num_attention_heads) // tp),
        max_seqlen_q=queries,
        max_seqlen_kv=_LENGTH,
        head_dim_qk=transformer.kv_channels,
        head_dim_v=transformer.kv_channels,
        attn_mask_type=_PIECES if pieces else _DOCUMENTS_MASK,
        window_size=(-1, 0),
        core_attention_bias_shape=None,
        core_attention_bias_requires_grad=False,
        fp8_meta={},
        context_parallel=ring,
        cp_comm_type=_RING,
        **newer,
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

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        whole = copy.copy(config)
        whole.context_parallel_size = 1  # gathered here, not by Transformer-Engine
        super().__init__(whole, *args, **kwargs)
        self.pg = kwargs["pg_collection"]

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
        """Attend: query [N, B, H, D], key and value [N, B, G, D] -> [N, B, H * D]."""
        assert attention_mask is None and attention_bias is None, "documents come in packed_seq_params"
        if packed_seq_params is None:
            return super().forward(query, key, value, None, AttnMaskType.causal)
        length, batch = query.shape[:2]
        if packed_seq_params.context is None:
            ends = packed_seq_params.document_ends()
            ragged = (_flat(query), _flat(key), _flat(value))
            out = self._over(ragged, (ends, ends), (length, length), _DOCUMENTS_MASK)
        else:
            pieces = packed_seq_params.pieces()
            ragged = (_flat(query), *self._gathered(key, value, packed_seq_params))
            most = (length, packed_seq_params.document_ids.shape[0])
            out = self._over(ragged, (pieces.query_ends, pieces.key_ends), most, _PIECES)
        return out.view(batch, length, -1).transpose(0, 1)

    def _gathered(self, key: Tensor, value: Tensor, params: MixedModalParams) -> tuple[Tensor, Tensor]:
        """[N, B, G, D] of all ranks -> keys and values of this rank's pieces, [K, G, D] each, in one message."""
        assert params.context is not None
        pieces = params.pieces()
        both = params.context.gather_rows(torch.cat((key, value), dim=-1), self.pg.cp, pieces.keys)
        # Kernels do not write gradients of rows that no sequence has.
        both = both.masked_fill(pieces.unused.view(-1, 1, 1), 0)
        found, other = both.split((key.shape[-1], value.shape[-1]), dim=-1)
        return found.contiguous(), other.contiguous()

    def _over(
        self,
        ragged: tuple[Tensor, Tensor, Tensor],
        ends: tuple[Tensor, Tensor],
        longest: tuple[int, int],
        mask: str,
    ) -> Tensor:
        """Attention over ragged sequences.

        Args:
            ragged: queries [tokens, H, D], keys and values [tokens, G, D].
            ends: where sequences end, among queries and among keys.
            longest: bounds of their lengths.
            mask: Transformer-Engine's name.

        Returns:
            [tokens, H * D].
        """
        sequences = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=ends[0],
            cu_seqlens_kv=ends[1],
            max_seqlen_q=longest[0],
            max_seqlen_kv=longest[1],
        )
        with _known_choice((len(ends[0]), len(ragged[0]), len(ragged[1]), *longest, self.training)):
            return super().forward(*ragged, None, _Mask(mask), packed_seq_params=sequences)


@dataclass
class _Documents(PackedSeqParams):
    """Documents for the ring, with an argument of Transformer-Engine's that megatron-core lacks.

    Attributes:
        pad_between_seqs: whether there are gaps between documents. None would make Transformer-Engine compare the two
            arrays of ends, and wait for the device, in every layer.
    """

    pad_between_seqs: bool = False


class RingDocumentAttention(TEDotProductAttention):
    """Transformer-Engine's context parallelism: keys and values of other ranks arrive one rank after another.

    Each rank has two pieces of every document, an early and a late one next to each other: what Transformer-Engine
    expects of its `thd` format (tex.thd_get_partitioned_indices). Until backward a rank keeps its own part of keys and
    values only. The results of the steps are added in the model's number format, so rounding grows with the ranks.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        assert config.context_parallel_size > 1, "a ring needs several ranks"
        super().__init__(config, *args, **{**kwargs, "cp_comm_type": _RING})
        self.kept_packed_seq_params.add("pad_between_seqs")

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
        """Attend: query [N, B, H, D], key and value [N, B, G, D] -> [N, B, H * D].

        Raises:
            DataError: the micro-batch has more documents than Transformer-Engine's kernels take.
        """
        assert attention_mask is None and attention_bias is None, "documents come in packed_seq_params"
        assert packed_seq_params is not None and packed_seq_params.context is not None, "the batch was not split"
        ends, whole = packed_seq_params.document_ends(), packed_seq_params.document_ids.shape[0]
        if len(ends) - 1 > _MOST_IN_A_RING:
            raise DataError(
                f"room for {len(ends) - 1:,} documents in a micro-batch: Transformer-Engine's ring takes at most "
                f"{_MOST_IN_A_RING:,}",
                remedy="use parallel.cp_attention=gather, or a smaller train.micro_batch_size",
            )
        # Ends and lengths are those of whole documents; Transformer-Engine divides them by the number of ranks.
        sequences = _Documents(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            cu_seqlens_q_padded=ends,
            cu_seqlens_kv_padded=ends,
            max_seqlen_q=whole,
            max_seqlen_kv=whole,
        )
        with _known_choice(("ring", len(ends), whole, self.training)):
            ragged = (_flat(query), _flat(key), _flat(value))
            out = super().forward(*ragged, None, _Mask(_DOCUMENTS_MASK), packed_seq_params=sequences)
        return out.view(query.shape[1], query.shape[0], -1).transpose(0, 1)


@dataclass(frozen=True)
class _Mask:
    """Stands for megatron-core's `AttnMaskType`, which lacks one of Transformer-Engine's masks."""

    name: str


def _flat(tensor: Tensor) -> Tensor:
    """[N, B, ...] -> [B * N, ...], the tokens of a sequence next to each other; with one sequence nothing is copied."""
    return tensor.transpose(0, 1).reshape(-1, *tensor.shape[2:])
