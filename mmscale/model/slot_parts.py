"""The classes that a backend provides: one for each kind of slot of a layer. Names only; nothing is imported here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Parts:
    """The classes that a backend fills the slots with; each is made with megatron-core's arguments of that slot.

    Norms are named, never megatron-core's LNImpl: that one is another class where anything called `apex` is importable.

    Attributes:
        column, row: linears whose output or input is sharded over tensor-parallel ranks.
        norm_column: a norm and the column-parallel linear after it in one; None: two modules.
        norm: RMSNorm.
        attention: core attention, causal within documents.
    """

    column: type
    row: type
    norm_column: type | None
    norm: type
    attention: type

    @property
    def keys(self) -> dict[str, str]:
        """Names of a fused norm's weights in a checkpoint: those of a separate norm module."""
        if self.norm_column is None:
            return {}
        return {
            "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
            "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
        }
