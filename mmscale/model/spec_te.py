"""Transformer-Engine's classes for the slots of spec.py. Imported only if Transformer-Engine is installed.

Routers, embedding and output layer are not included: they stay in higher precision with both backends.
"""

from __future__ import annotations

from megatron.core.transformer.transformer_config import TransformerConfig

from mmscale.model.attention import DocumentAttention
from mmscale.model.attention_te import FusedDocumentAttention, takes_documents
from mmscale.model.linear_te import ColumnLinear, Norm, NormColumnLinear, RowLinear
from mmscale.model.slot_parts import Parts
from mmscale.model.untied_te import GroupedColumnLinear, GroupedRowLinear


def parts(transformer: TransformerConfig) -> Parts:
    """The classes of a layer except for the experts, which `model.experts.compute` selects (expert_compute.py)."""
    return Parts(
        column=ColumnLinear,
        row=RowLinear,
        norm_column=NormColumnLinear,
        norm=Norm,
        attention=FusedDocumentAttention if takes_documents(transformer) else DocumentAttention,
        untied_column=GroupedColumnLinear,
        untied_row=GroupedRowLinear,
    )
