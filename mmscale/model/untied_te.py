"""Linears with weights for each modality whose products are Transformer-Engine's grouped ones, in bf16, fp32 or FP8.

Imported only if Transformer-Engine is usable. Parameters and checkpoints are those of untied.py. GroupedLinear takes
the sizes of its groups as a list, so it is used where the host knows them. In Mixture-of-Depths layers, whose tokens
are chosen on the device, the host knows upper bounds: FP8 products take these, and other products are torch's there. So
are other products if only some modalities are trained; FP8 is refused then (config/model/rules.py).

FP8 tensor cores need rows in multiples, so rows of zeros fill up each group, as megatron-core's experts do
(moe/experts.py, Fp8Padding). They change neither an amax nor a gradient. Tensor-parallel ranks exchange tokens before
and after the product, in bf16: Transformer-Engine does not know that a weight is sharded.

No fused gradient accumulation: a weight whose micro-batches take different ways would lose gradients, since
Transformer-Engine marks it as accumulated for all of them.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.extensions.transformer_engine import te
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

from mmscale.config.precision.fp8 import group_multiple_of
from mmscale.model.linear_te import PlainState
from mmscale.model.mixed_modal import MixedModalParams
from mmscale.model.state_te import FP8_STATE, delayed
from mmscale.model.untied import Rows, UntiedColumnLinear, UntiedLinear, UntiedRowLinear


def padded_rows(params: MixedModalParams, rows: Rows, multiple: int) -> tuple[Tensor, list[int]]:
    """Places for the rows of each modality in groups whose sizes are multiples. Made once for all layers.

    Args:
        params: of the micro-batch, whose counts the host knows, or their bounds. Without them the device is read.
        rows: the rows by modality.
        multiple: divisor of the sizes.

    Returns:
        [T] int64, the place of every row of the tokens; and the sizes of the groups, 0 for one without rows.
    """

    def make() -> tuple[Tensor, list[int]]:
        total = len(rows.back)
        counts = rows.on_host() if params.counts is None else params.counts.at_most(total)
        sizes = [-(-count // multiple) * multiple for count in counts]
        starts = list(accumulate(sizes[:-1]))
        places = rows.back
        for end, start in zip(rows.ends[:-1], starts, strict=True):
            places = torch.where(rows.back >= end, rows.back - end + start, places)
        return places, sizes

    return params.cached(("padded rows by modality", multiple), make)


class _Kernels(PlainState, te.pytorch.GroupedLinear):
    """The grouped product and its FP8 state; the weights are those of the linear that it belongs to."""

    def __init__(self, config: TransformerConfig, weights: list[Tensor]) -> None:
        self.config, self.products = config, len(weights)
        outputs, inputs = weights[0].shape
        super().__init__(self.products, inputs, outputs, bias=False, params_dtype=weights[0].dtype, device="meta")
        for number, weight in enumerate(weights):
            setattr(self, f"weight{number}", weight)


class _Grouped(UntiedLinear):
    """The product of both linears.

    Attributes:
        is_first_microbatch: set by megatron-core; weights are cast to FP8 once for all micro-batches of a step.
    """

    keeps_fp8_state = True

    def __init__(self, *sizes: Any, config: TransformerConfig, **kwargs: Any) -> None:
        kwargs["config"] = config
        super().__init__(*sizes, **kwargs)
        self._scaled, self.is_first_microbatch = delayed(config), True
        self._multiple = group_multiple_of(config.fp4_recipe if config.fp4 else config.fp8_recipe)
        # In a tuple: no submodule, so its parameters have one name only.
        self._kernels = (_Kernels(config, self.weights),)

    def train(self, mode: bool = True) -> _Grouped:
        """As in the base class, for the kernels too: Transformer-Engine keeps scales for recomputation in training."""
        self._kernels[0].train(mode)
        return super().train(mode)

    def _multiply(self, tokens: Tensor, rows: Rows) -> Tensor:
        if FP8GlobalStateManager.is_fp8_enabled():
            return self._multiply_fp8(tokens, rows)
        # Transformer-Engine asks the first weight only whether gradients are needed.
        trained = {weight.requires_grad for weight in self.weights}
        if rows.counts is None or len(trained) > 1:
            return super()._multiply(tokens, rows)
        grouped = self._kernels[0](tokens.index_select(0, rows.order), rows.counts)
        found: Tensor = grouped.index_select(0, rows.back)
        return found

    def _multiply_fp8(self, tokens: Tensor, rows: Rows) -> Tensor:
        places, sizes = padded_rows(self._seen, rows, self._multiple)
        grouped = tokens.new_zeros(sum(sizes), tokens.shape[1]).index_copy(0, places, tokens)
        product: Tensor = self._kernels[0](grouped, sizes, is_first_microbatch=self.is_first_microbatch)
        self.is_first_microbatch = False
        return product.index_select(0, places)

    def fp8_state(self) -> Tensor:
        """[1 + A, M, 5], see state_te.py: delayed scales and their history for each modality."""
        return self._kernels[0].fp8_state()

    def set_fp8_state(self, packed: Tensor) -> None:
        """Restore the result of `fp8_state`."""
        self._kernels[0].set_fp8_state(packed)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """As in the base class, and each modality's FP8 state under the name that emulated FP8 gives it."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self._scaled:
            states = zip(self._names, self.fp8_state().split(1, dim=1), strict=True)
            sharded |= make_sharded_tensors_for_checkpoint(
                {f"{name}.{FP8_STATE}": state.contiguous() for name, state in states},
                prefix,
                {},
                sharded_offsets,
                tp_group=self._tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
        return sharded

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        loaded = [state_dict.pop(f"{prefix}{name}.{FP8_STATE}", None) for name in self._names]
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not self._scaled or all(state is None for state in loaded):
            return
        own = self.fp8_state().cpu().split(1, dim=1)
        states = [before if state is None else state.cpu() for before, state in zip(own, loaded, strict=True)]
        self.set_fp8_state(torch.cat(states, dim=1))


class GroupedColumnLinear(_Grouped, UntiedColumnLinear):
    """[S / CP / TP, B, in] -> [S / CP, B, out / TP]."""


class GroupedRowLinear(_Grouped, UntiedRowLinear):
    """[S / CP, B, in / TP] -> [S / CP / TP, B, out]."""
