"""Linears and norms with weights of their own for each modality (Mixture-of-Transformers, arXiv 2411.04996, section 2).

A token is multiplied by the weights of its own modality. Every token is processed exactly once, so the work is that of
a dense model, and shapes do not depend on the mix of modalities. There is no router and no capacity: the result for a
token depends on that token alone, so training and inference compute the same.

Rows are sorted by modality, multiplied group by group, and put back. Padding belongs to the last modality; nothing
reads it.

A module learns the modalities from `see`, which the layer calls immediately before it uses the module. Recomputation
of a layer, or of its feed-forward part, calls it again with the micro-batch that is recomputed.

Parameters have the modality's name, e.g. `linear_qkv.text`, and belong to the module that is called: overlapped
parameter gathering waits for a weight in a forward hook of the module that holds it.

Shapes: S tokens of a full sequence, split over CP context-parallel and then TP tensor-parallel ranks, B sequences,
T = S / CP * B rows, M modalities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLP, MLPSubmodules, apply_swiglu_sharded_factory
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from mmscale.model.mixed_modal import MixedModalParams

Multiply = Callable[[Tensor, Tensor], Tensor]  # rows [N, in] of one modality and its weight [out, in] -> [N, out]


@dataclass(frozen=True)
class Rows:
    """The rows of this context-parallel rank's tokens, [S / CP, B] flattened, sorted by modality.

    Attributes:
        order: [T] int64, the rows of the first modality, then those of the second, and so on.
        back: [T] int64, the inverse of `order`.
        ends: [M] int32, where the rows of each modality end in `order`.
        counts: rows of each modality, on the host; None: only the device knows them, as in Mixture-of-Depths layers.
    """

    order: Tensor
    back: Tensor
    ends: Tensor
    counts: list[int] | None

    def on_host(self) -> list[int]:
        """Rows of each modality; waits for a GPU."""
        return self.ends.diff(prepend=self.ends.new_zeros(1)).tolist() if self.counts is None else self.counts


def rows_of(params: MixedModalParams, modalities: int) -> Rows:
    """The sorted rows of a micro-batch, made once for all its layers. Nothing is read from a GPU."""

    def make() -> Rows:
        ids = params.local(params.modality_ids).reshape(-1)
        own = torch.where(ids < 0, modalities - 1, ids)
        order = own.sort(stable=True).indices
        numbers = torch.arange(modalities, device=ids.device)
        each = (own.unsqueeze(1) == numbers).sum(dim=0)
        known = None if params.counts is None else params.counts.rows(len(own))
        if known is None and not ids.is_cuda:
            known = each.tolist()
        return Rows(
            order=order,
            back=torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=ids.device)),
            ends=each.cumsum(0).int(),
            counts=known,
        )

    return params.cached("rows by modality", make)


def product(
    tokens: Tensor, weights: Sequence[Tensor], rows: Rows, *, multiply: Sequence[Multiply] | None = None
) -> Tensor:
    """Multiply every row by the weight of its modality.

    A modality without rows gets a gradient of zeros, not None, so that all ranks reduce the same gradients.

    Args:
        tokens: [T, in].
        weights: for each modality [out, in].
        rows: the rows by modality.
        multiply: replaces the product of each modality, for emulated FP8; None: plain products.

    Returns:
        [T, out].
    """
    grouped = tokens.index_select(0, rows.order)
    if multiply is not None:
        groups = zip(multiply, grouped.split(rows.on_host()), weights, strict=True)
        out = torch.cat([one(part, weight) for one, part, weight in groups])
    elif rows.counts is None or grouped.is_cuda:
        out = _grouped_mm(grouped, torch.stack(tuple(weights)), rows.ends)
    else:
        parts = zip(grouped.split(rows.counts), weights, strict=True)
        out = torch.cat([F.linear(part, weight) for part, weight in parts])
    return out.index_select(0, rows.back)


def _grouped_mm(tokens: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """One kernel for all groups, whose sizes are on the device: [T, in], [M, out, in], [M] -> [T, out]."""
    out: Tensor = F.grouped_mm(tokens, weights.transpose(-2, -1), offs=ends)
    return _ContiguousGradient.apply(out)  # type: ignore[no-any-return]


class _ContiguousGradient(torch.autograd.Function):
    """The identity. grouped_mm's backward refuses gradients with strides of zero, as an expanded sum gives."""

    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


class Untied(nn.Module):
    """A module with one parameter for each modality, by the modality's name."""

    def __init__(self, config: TransformerConfig, shape: tuple[int, ...], fill: Callable[..., Tensor]) -> None:
        super().__init__()
        self._names: tuple[str, ...] = config.untied_modalities  # no field of megatron-core: set by build.py
        self._params: MixedModalParams | None = None
        self._tp_rank = 0
        for name in self._names:
            self.register_parameter(name, nn.Parameter(fill(shape, dtype=config.params_dtype)))

    def see(self, params: MixedModalParams, tp_rank: int) -> None:
        """Take the modalities of the tokens that the next call gets, and this rank's number among the TP ranks."""
        self._params, self._tp_rank = params, tp_rank

    @property
    def _seen(self) -> MixedModalParams:
        assert self._params is not None, "the layer calls `see` first"
        return self._params

    @property
    def weights(self) -> list[Tensor]:
        """The parameters, in the order of modalities."""
        return [self.get_parameter(name) for name in self._names]


class UntiedLinear(Untied):
    """What column- and row-parallel linears have in common. No biases.

    Args:
        shape: of this rank's part of each weight, [out, in].
        axis: the axis that tensor-parallel ranks share.
        stride: 2 if the weight is gate and up projection, each shared by the ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        shape: tuple[int, int],
        *,
        axis: int,
        stride: int,
        bias: bool,
        tp_group: ProcessGroup,
    ) -> None:
        assert not bias, "refused by config/model/rules.py"
        super().__init__(config, shape, torch.empty)
        self._axis, self._stride, self._tp = axis, stride, tp_group
        self._products: nn.ModuleDict | None = None
        for weight in self.weights:
            set_tensor_model_parallel_attributes(weight, True, axis, stride)
            weight.allreduce = True  # type: ignore[attr-defined]  # over all data-parallel ranks, unlike experts

    def use(self, products: nn.ModuleDict) -> None:
        """Take modules that multiply the rows of each modality (`Multiply`), by its name; for emulated FP8."""
        self._products = products

    def _product(self, tokens: Tensor) -> Tensor:
        rows = rows_of(self._seen, len(self._names))
        return self._multiply(tokens.flatten(0, 1), rows).unflatten(0, tokens.shape[:2])

    def _multiply(self, tokens: Tensor, rows: Rows) -> Tensor:
        """[T, in] -> [T, out]."""
        multiply = None if self._products is None else [self._products[name] for name in self._names]
        return product(tokens, self.weights, rows, multiply=multiply)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Each modality's weight, shared along the axis; gate and up projection are shared separately."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        found: ShardedStateDict = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            dict.fromkeys(self._names, self._axis),
            sharded_offsets,
            tp_group=self._tp,
            dp_cp_group=metadata["dp_cp_group"],
        )
        if self._stride == 1:
            return found
        single = metadata.get("singleton_local_shards", False)
        return {key: apply_swiglu_sharded_factory(part, sharded_offsets, single) for key, part in found.items()}


class UntiedColumnLinear(UntiedLinear):
    """[S / CP / TP, B, in] -> [S / CP, B, out / TP]; takes the arguments of megatron-core's ColumnParallelLinear."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        tp_group: ProcessGroup,
        bias: bool = True,
        stride: int = 1,
        **_: Any,
    ) -> None:
        shape = (output_size // tp_group.size(), input_size)
        super().__init__(config, shape, axis=0, stride=stride, bias=bias, tp_group=tp_group)

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        """The product and no bias, as megatron-core's linears return them."""
        tokens = gather_from_sequence_parallel_region(tokens, tensor_parallel_output_grad=True, group=self._tp)
        return self._product(tokens), None


class UntiedRowLinear(UntiedLinear):
    """[S / CP, B, in / TP] -> [S / CP / TP, B, out]; takes the arguments of megatron-core's RowParallelLinear."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        tp_group: ProcessGroup,
        bias: bool = True,
        **_: Any,
    ) -> None:
        shape = (output_size, input_size // tp_group.size())
        super().__init__(config, shape, axis=1, stride=1, bias=bias, tp_group=tp_group)

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        """The product, summed over tensor-parallel ranks, and no bias."""
        return reduce_scatter_to_sequence_parallel_region(self._product(tokens), group=self._tp), None


class UntiedRMSNorm(Untied):
    """RMSNorm over the last dimension, with the weight of each token's modality.

    Takes the arguments of `mmscale.model.norm.RMSNorm`. The tokens are those of this rank, [S / CP / TP, B, ...], or
    all of the tensor-parallel ranks', [S / CP, B, heads, D].
    """

    is_norm = True  # its weights start at one

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(config, (hidden_size,), torch.ones)
        self._eps = eps
        for weight in self.weights:
            weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """Any shape [rows, B, ..., hidden_size], same out."""
        weights = torch.stack(self.weights)
        # A product with zeros and ones picks the weight, and its backward sums without atomic additions.
        weight = self._one_hot(hidden) @ weights
        weight = weight.view(*weight.shape[:2], *(1,) * (hidden.dim() - 3), -1)
        return F.rms_norm(hidden, hidden.shape[-1:], None, self._eps) * weight

    def _one_hot(self, hidden: Tensor) -> Tensor:
        """[rows, B, M] of the tokens' type: one at each token's modality."""
        params, count, length = self._seen, len(self._names), hidden.shape[0]
        ids = params.local(params.modality_ids)
        shared = ids.shape[0] != length  # the tensor-parallel ranks share the tokens
        if shared:
            ids = ids[self._tp_rank * length :][:length]

        def make() -> Tensor:
            own = torch.where(ids < 0, count - 1, ids).long()
            return F.one_hot(own, count).to(hidden.dtype)

        return params.cached(("one-hot modalities", shared, hidden.dtype), make)


class UntiedMLP(MLP):
    """megatron-core's MLP with untied linears. The layer passes the per-token data as `padding_mask`."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        *,
        tp_group: ProcessGroup,
        **_: object,  # as for MoMa: from 0.18 on megatron-core also passes its own pg_collection and names
    ) -> None:
        super().__init__(config, submodules, tp_group=tp_group)

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[S / CP / TP, B, H] -> the same, and no bias. Recomputation starts here, so the modalities are set here."""
        for linear in (self.linear_fc1, self.linear_fc2):
            linear.see(kwargs["padding_mask"], self.tp_group.rank())
        return super().forward(hidden_states, per_token_scale)  # type: ignore[no-any-return]


def pass_modalities_to_final_norm(decoder: nn.Module, tp_rank: int) -> None:
    """Have a decoder pass each micro-batch's modalities to its untied final norm, if it has one.

    Args:
        decoder: megatron-core's TransformerBlock, which is called with `packed_seq_params`.
        tp_rank: this rank's number among the tensor-parallel ranks.
    """
    norm = getattr(decoder, "final_layernorm", None)
    if isinstance(norm, Untied):

        def see(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            norm.see(kwargs["packed_seq_params"], tp_rank)

        decoder.register_forward_pre_hook(see, with_kwargs=True)


def untied_modules(layer: nn.Module) -> Iterator[Untied]:
    """All modules of a layer that need to know the tokens' modalities."""
    return (module for module in layer.modules() if isinstance(module, Untied))
