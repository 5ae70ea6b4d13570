"""Transformer-Engine's linears and norm with mmscale's checkpoint names.

Imported only if Transformer-Engine is usable (runtime/transformer_engine.py). The classes are megatron-core's wrappers
with other state dicts (state_te.py), and take the arguments that the slots of mixed-modal layers pass.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TELayerNormColumnParallelLinear,
    TERowParallelLinear,
    te,
)
from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor

from mmscale.model.state_te import FP8_STATE, Scaling, delayed
from mmscale.runtime import device


def with_fusion(config: TransformerConfig) -> TransformerConfig:
    """The configuration for creating Transformer-Engine's modules.

    megatron-core has one switch for gradient accumulation fusion in all linears, and its own output layer refuses it
    without apex, although Transformer-Engine's linears work without apex. build.py sets
    `te_gradient_accumulation_fusion` for them.
    """
    if not getattr(config, "te_gradient_accumulation_fusion", False) or config.gradient_accumulation_fusion:
        return config
    config = copy.copy(config)
    config.gradient_accumulation_fusion = True
    return config


class PlainState:
    """Mix-in before a module of Transformer-Engine: FP8 state is a plain tensor, and `_extra_state` stays empty.

    megatron-core's own linears have an empty `_extra_state` too, so the names in a checkpoint are the same.
    """

    config: TransformerConfig
    fp8_meta: dict[str, Any]
    keeps_fp8_state = True
    products = 1
    # Modules that order scales by product declare here how many belong to one product (grouped_linear.py, since 2.9).
    _num_fp8_tensors_per_gemm: Any = None

    def get_extra_state(self) -> None:
        """Empty, as for megatron-core's linears."""

    def set_extra_state(self, state: Any) -> None:
        """Ignored: the entry is empty in a checkpoint."""

    @property
    def _interleaved(self) -> bool:
        return self.products == 1 or self._num_fp8_tensors_per_gemm is not None

    def fp8_state(self) -> Tensor:
        """[1 + A, G, 5], see state_te.py: the present state, or the initial one if there is none yet."""
        if "scaling_fwd" not in self.fp8_meta:
            return Scaling.fresh(self.products, self.config.fp8_amax_history_len).packed(interleaved=True)
        forward, backward = self.fp8_meta["scaling_fwd"], self.fp8_meta["scaling_bwd"]
        state = Scaling(forward.scale, forward.amax_history, backward.scale, backward.amax_history)
        return state.packed(interleaved=self._interleaved).detach()

    def set_fp8_state(self, packed: Tensor) -> None:
        """Restore the result of `fp8_state` through Transformer-Engine's reader, which allocates missing tensors."""
        state = Scaling.unpacked(packed.cpu(), interleaved=self._interleaved)
        plain = {
            "recipe": get_fp8_recipe(self.config),
            "extra_fp8_variables": {"num_gemms": self.products, "fp8_checkpoint": True},
            "scale_fwd": state.scale_fwd,
            "amax_history_fwd": state.amax_fwd,
            "scale_bwd": state.scale_bwd,
            "amax_history_bwd": state.amax_bwd,
        }
        content = torch.frombuffer(bytearray(pickle.dumps(plain)), dtype=torch.uint8)
        super().set_extra_state(content)  # type: ignore[misc]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        packed = state_dict.pop(f"{prefix}{FP8_STATE}", None)
        state_dict.setdefault(f"{prefix}_extra_state", None)  # missing in checkpoints written by other tools
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]
        if packed is not None and delayed(self.config):
            self.set_fp8_state(packed)


class _Linear(PlainState):
    """The common part of the three linears."""

    def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(*args, config=with_fusion(config), **kwargs)  # type: ignore[call-arg]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: dict | None = None) -> Any:
        """megatron-core's names, and the FP8 state, if any, which is the same on all ranks that hold the layer."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        if delayed(self.config):
            sharded |= make_sharded_tensors_for_checkpoint(
                {FP8_STATE: self.fp8_state()},
                prefix,
                {},
                sharded_offsets,
                tp_group=self._tp_group,  # type: ignore[attr-defined]
                dp_cp_group=metadata["dp_cp_group"],
            )
        return sharded


class ColumnLinear(_Linear, TEColumnParallelLinear):
    """Linear whose output is sharded."""


class RowLinear(_Linear, TERowParallelLinear):
    """Linear whose input is sharded."""


class NormColumnLinear(_Linear, TELayerNormColumnParallelLinear):
    """RMSNorm and the linear after it: the normalised input is produced in FP8 directly and not stored twice."""

    has_norm = True


class Norm(te.pytorch.RMSNorm):
    """Transformer-Engine's RMSNorm with the arguments of megatron-core's norm slots."""

    is_norm = True
    # The norm's only state is its weight; the base class would put an empty `_extra_state` into every checkpoint.
    get_extra_state = torch.nn.Module.get_extra_state
    set_extra_state = torch.nn.Module.set_extra_state

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(
            hidden_size,
            eps=eps,
            sequence_parallel=config.sequence_parallel,
            dtype=config.params_dtype,
            device=device.taken(),
        )
