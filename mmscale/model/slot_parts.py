"""The classes that a backend provides for the slots of a layer. This module imports none of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Parts:
    """The classes with which a backend fills the slots; each takes megatron-core's arguments for that slot.

    Norms are named here instead of using megatron-core's LNImpl, which is another class if a package `apex` is
    importable.

    Attributes:
        column, row: linears whose output or input is sharded over tensor-parallel ranks.
        norm_column: a module that is a norm and the column-parallel linear after it; None: the backend uses two
            modules.
        norm: RMSNorm.
        attention: core attention, causal within documents.
        untied_column, untied_row: as `column` and `row`, with weights for each modality.
    """

    column: type
    row: type
    norm_column: type | None
    norm: type
    attention: type
    untied_column: type
    untied_row: type

    @property
    def keys(self) -> dict[str, str]:
        """Maps the checkpoint names of a fused norm's weights to those of a separate norm module."""
        if self.norm_column is None:
            return {}
        return {
            "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
            "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
        }
