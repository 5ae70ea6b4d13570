"""Transformer-Engine's classes for the slots of spec.py. Imported only if Transformer-Engine is installed.

Routers, embedding and output layer are not included: they stay in higher precision with both backends.
"""

from __future__ import annotations

from megatron.core.transformer.transformer_config import TransformerConfig

from mmscale.errors import ConfigError
from mmscale.model.attention import DocumentAttention
from mmscale.model.attention_te import FusedDocumentAttention, RingDocumentAttention, takes_documents
from mmscale.model.linear_te import ColumnLinear, Norm, NormColumnLinear, RowLinear
from mmscale.model.slot_parts import Parts
from mmscale.model.untied_te import GroupedColumnLinear, GroupedRowLinear


def parts(transformer: TransformerConfig, *, ring: bool = False) -> Parts:
    """The classes of a layer except for the experts, which `model.experts.compute` selects (expert_compute.py).

    Args:
        transformer: heads and layout.
        ring: context parallelism by Transformer-Engine's ring.

    Raises:
        ConfigError: a ring is requested, and Transformer-Engine has no kernel for it here.
    """
    return Parts(
        column=ColumnLinear,
        row=RowLinear,
        norm_column=NormColumnLinear,
        norm=Norm,
        attention=_ring(transformer) if ring else _whole(transformer),
        untied_column=GroupedColumnLinear,
        untied_row=GroupedRowLinear,
    )


def _whole(transformer: TransformerConfig) -> type:
    return FusedDocumentAttention if takes_documents(transformer) else DocumentAttention


def _ring(transformer: TransformerConfig) -> type:
    if not takes_documents(transformer, ring=True):
        raise ConfigError(
            "parallel.cp_attention = ring, but Transformer-Engine has no fused attention for packed documents under "
            "context parallelism on this machine (NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 print its reasons)",
            remedy="use parallel.cp_attention=gather",
        )
    return RingDocumentAttention
