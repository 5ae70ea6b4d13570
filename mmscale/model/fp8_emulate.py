"""FP8 linears and experts in plain torch: the numerics of Transformer-Engine's FP8 on any device, without its speed.

In forward both operands are rounded to e4m3, in backward the gradient to e5m2 (`hybrid`) or e4m3; products are summed
in fp32 and returned in the operands' format. SwiGLU, norms, attention scores and everything else are unchanged. The
formulas are in fp8_formats.py; train/steps/fp8_scales.py updates delayed scales at the end of a step.

Two details differ from Transformer-Engine's, so that losses depend on the layout no more than without FP8:
tensor- and context-parallel ranks reduce the amax of a tensor that is spread over them, and delayed scales move once
per optimizer step instead of once per micro-batch.

Shapes: L products of one kind (experts on this rank; 1 for a linear), M rows, K summed over, N columns.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor, nn
from torch.nn import functional as F

from mmscale.config import Config
from mmscale.errors import ConfigError
from mmscale.model import fp4_formats
from mmscale.model import fp8_formats as formats
from mmscale.model.auxiliary import Fp32Buffers
from mmscale.model.expert_compute import swiglu
from mmscale.model.experts import Experts
from mmscale.model.fp8_formats import Blocks, Quantized
from mmscale.model.fp8_recipe import COLUMNS, GRADIENT, ROWS, WEIGHT, Recipe
from mmscale.model.untied import UntiedLinear


class DelayedScales(Fp32Buffers):
    """Scales of a product's three tensors and the amax values that determine them, for each of L products.

    They are not in the model's state dict, so that weights are the same with any recipe: train/steps/fp8_scales.py
    stores them in checkpoints, as state_te.py does for Transformer-Engine.

    Attributes:
        state: [1 + steps, L, 5] fp32, scales in row 0 and amax values below; row 1 holds those recorded since the last
            update. Columns are input, weight, output, gradient of the output, gradient of the input.
        groups: process groups of this rank.
        place: for experts that are distributed over expert-parallel ranks: index of the first one here, and E. None:
            every rank has the product.
        name: of the weight in a checkpoint.
    """

    state: Tensor
    name = ""

    def __init__(
        self, recipe: Recipe, groups: ProcessGroupCollection, *, count: int, place: tuple[int, int] | None
    ) -> None:
        super().__init__()
        self.recipe, self.groups, self.place = recipe, groups, place
        state = torch.zeros(1 + recipe.history, count, COLUMNS)
        state[0] = 1.0
        self.register_buffer("state", state, persistent=False)

    def scale(self, role: int) -> Tensor:
        """Scale of one of the tensors for each product, [L, 1, 1]."""
        return self.state[0, :, role].view(-1, 1, 1)

    def see(self, role: int, amax: Tensor) -> None:
        """Record the amax [L, 1, 1] of one of the tensors. NaN is recorded as infinity, so that ranks can reduce it."""
        found = torch.nan_to_num(amax.view(-1), nan=float("inf"), posinf=float("inf"))
        self.seen[:, role] = torch.maximum(self.seen[:, role], found)

    @property
    def seen(self) -> Tensor:
        """[L, 5], amax values recorded since the last update; a view."""
        return self.state[1]

    def update(self) -> None:
        """Compute the scales of the next step; call it after ranks have reduced `seen`."""
        limits = [formats.largest(self.recipe.format_of(role)) for role in range(COLUMNS)]
        formats.update_delayed(
            self.state[1:],
            self.state[0],
            torch.tensor(limits, device=self.state.device),
            margin=self.recipe.margin,
            most_recent=self.recipe.most_recent,
        )


class Fp8Product(nn.Module):
    """[L, M, K] x [L, K, N] -> [L, M, N] in emulated FP8, forward and backward.

    Args:
        recipe: how tensors are scaled.
        groups: process groups; tensor- and context-parallel ranks reduce amax values.
        name: of the weight in a checkpoint.
        count: L.
        place: as for `DelayedScales`.

    Attributes:
        step: number of the optimizer step, for stochastic rounding; train/steps/fp8_scales.py sets it.
    """

    def __init__(
        self,
        recipe: Recipe,
        groups: ProcessGroupCollection,
        *,
        name: str = "",
        count: int = 1,
        place: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.recipe, self.step = recipe, 0
        self._seed = zlib.crc32(f"{recipe.seed} {name}".encode())
        # The ranks over which one tensor is spread. Expert-parallel ranks hold different experts.
        spread = (groups.tp,) if place is not None else (groups.tp, groups.cp)
        self.together = [group for group in spread if group.size() > 1]
        self.scales: DelayedScales | None = None
        if recipe.scaling == "delayed":
            self.scales = DelayedScales(recipe, groups, count=count, place=place)
            self.scales.name = name

    def forward(self, rows: Tensor, weight: Tensor) -> Tensor:
        """[L, M, K] x [L, K, N] -> [L, M, N] in the type of `rows`. The recipe rounds both factors; sums are fp32.

        Raises:
            ConfigError: a dimension is not a multiple of 16 (MXFP8: 32), as FP8 tensor cores require.
        """
        require_aligned(rows.shape[-2], rows.shape[-1], weight.shape[-1], multiple=self.recipe.alignment)
        product: Tensor = _Product.apply(rows, weight, self)
        return product

    @torch.no_grad()
    def quantize(self, tensor: Tensor, role: int, blocks: Blocks, *, seen: bool) -> Quantized:
        """Round one of the tensors.

        Args:
            tensor: [L, ., .].
            role: ROWS, WEIGHT or GRADIENT.
            blocks: which values share a scale.
            seen: record its amax for delayed scaling.
        """
        dtype = self.recipe.format_of(role)
        if blocks.four_bits:
            return self._quantize_fp4(tensor, role, blocks)
        if blocks is not Blocks.TENSOR:
            return formats.quantize_blocks(tensor, dtype, blocks)
        if self.scales is not None:
            if seen:
                self.scales.see(role, formats.amax_of(tensor))
            return formats.quantize_tensor(tensor, self.scales.scale(role), dtype)
        amax = self._amax(tensor)
        return formats.quantize_tensor(tensor, formats.scale_of(amax, dtype, source=tensor.dtype), dtype)

    def _quantize_fp4(self, tensor: Tensor, role: int, blocks: Blocks) -> Quantized:
        tensor = fp4_formats.rotated(tensor) if blocks is Blocks.FP4_ROTATED else tensor
        dice = fp4_formats.Dice(self._seed, self.step) if self.recipe.stochastic and role == GRADIENT else None
        return fp4_formats.quantize(tensor, self._amax(tensor), blocks, dice=dice)

    def _amax(self, tensor: Tensor) -> Tensor:
        """[L, 1, 1], over all ranks over which the tensor is spread."""
        amax = formats.amax_of(tensor)
        for group in self.together:
            torch.distributed.all_reduce(amax, op=torch.distributed.ReduceOp.MAX, group=group)
        return amax


class _Product(torch.autograd.Function):
    """The three products of a linear: forward, gradient of the rows, gradient of the weight.

    With one scale per tensor, a tensor is rounded once and used in two products. Blocks, however, run along the
    dimension that is summed over, which differs between products, so a tensor is rounded separately for each product
    unless its blocks are the same.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, module: Fp8Product) -> Tensor:
        blocks = module.recipe.blocks
        left = module.quantize(rows, ROWS, blocks.rows, seen=module.training)
        right = module.quantize(weight, WEIGHT, blocks.weight, seen=module.training)
        rows_back, weight_back = left, right
        if blocks.rows_back is not blocks.rows and ctx.needs_input_grad[1]:
            rows_back = module.quantize(rows, ROWS, blocks.rows_back, seen=False)
        if blocks.weight_back is not blocks.weight and ctx.needs_input_grad[0]:
            weight_back = module.quantize(weight, WEIGHT, blocks.weight_back, seen=False)
        ctx.save_for_backward(*(part for kept in (rows_back, weight_back) for part in _tensors(kept)))
        ctx.module, ctx.blocks = module, (rows_back.blocks, weight_back.blocks)
        ctx.dtypes, ctx.training = (rows.dtype, weight.dtype), module.training
        return formats.product(left, right, rows.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        saved = ctx.saved_tensors
        rows = Quantized(saved[0], saved[1], ctx.blocks[0], saved[2])
        weight = Quantized(saved[3], saved[4], ctx.blocks[1], saved[5])
        blocks = ctx.module.recipe.blocks
        across = ctx.module.quantize(gradient, GRADIENT, blocks.gradient, seen=ctx.training)
        of_rows = of_weight = None
        if ctx.needs_input_grad[0]:
            of_rows = formats.product(across, formats.transposed(weight), ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            down = across
            if blocks.gradient_down is not blocks.gradient:
                down = ctx.module.quantize(gradient, GRADIENT, blocks.gradient_down, seen=False)
            of_weight = formats.product(formats.transposed(rows), down, ctx.dtypes[1])
        return of_rows, of_weight, None


def _tensors(quantized: Quantized) -> tuple[Tensor, Tensor, Tensor | None]:
    return quantized.codes, quantized.scale_inv, quantized.factor


def require_aligned(rows: int, inner: int, columns: int, *, multiple: int) -> None:
    """Refuse sizes that FP8 tensor cores do not support in one of a linear's three products.

    Args:
        rows: M, tokens.
        inner: K, inputs.
        columns: N, outputs.
        multiple: that each must be a multiple of.

    Raises:
        ConfigError: one of them is not a multiple of `multiple`.
    """
    for name, size in (("rows", rows), ("inputs", inner), ("outputs", columns)):
        if size % multiple:
            raise ConfigError(
                f"an FP8 product of [{rows}, {inner}] x [{inner}, {columns}]: {size} {name} are not a multiple of "
                f"{multiple}",
                remedy="use widths and numbers of tokens that are, or precision.fp8=off",
            )


class _Fp8Linear:
    """Base of megatron-core's linears whose product is computed in emulated FP8, after `attach` has set `fp8`."""

    fp8: Fp8Product | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fp8 = None  # an attribute of the instance: one of the class would hide the submodule that `attach` sets

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: A002
        if self.fp8 is None:
            output: Tensor = super()._forward_impl(input, weight, *args, **kwargs)  # type: ignore[misc]
            return output
        output = _linear(self.fp8, self._whole(input), weight)
        bias: Tensor | None = kwargs["bias"]  # added after the FP8 product, as in Transformer-Engine
        return output if bias is None else output + bias

    def _whole(self, hidden: Tensor) -> Tensor:
        """The rows of all tensor-parallel ranks, gathered if the input is split over them (sequence parallelism)."""
        return hidden


class Fp8ColumnParallelLinear(_Fp8Linear, ColumnParallelLinear):
    """A linear whose output is sharded over tensor-parallel ranks."""

    def _whole(self, hidden: Tensor) -> Tensor:
        assert self.sequence_parallel == (self.tp_group.size() > 1)
        if not self.sequence_parallel:
            return hidden
        return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=self.tp_group)


class Fp8RowParallelLinear(_Fp8Linear, RowParallelLinear):
    """A linear whose input is sharded over tensor-parallel ranks."""


def _linear(product: Fp8Product, hidden: Tensor, weight: Tensor) -> Tensor:
    """[S, B, K] and a weight [N, K] -> [S, B, N], through an FP8 product."""
    flat = hidden.reshape(1, -1, hidden.shape[-1])
    output: Tensor = product(flat, weight.t().unsqueeze(0))
    return output.view(*hidden.shape[:-1], -1)


class Fp8Rows(Fp8Product):
    """The product of one modality's rows in an untied linear: any number of them, with a scale of their own."""

    def forward(self, rows: Tensor, weight: Tensor) -> Tensor:
        """[N, K] and a weight [out, K] -> [N, out]. Rows of zeros fill up the multiple that FP8 needs."""
        count = rows.shape[0]
        filled = F.pad(rows, (0, 0, 0, -count % self.recipe.alignment))
        return super().forward(filled.unsqueeze(0), weight.t().unsqueeze(0))[0, :count]


class Fp8FeedForward(nn.Module):
    """SwiGLU experts whose two products are in emulated FP8; replaces `expert_compute.feed_forward`."""

    def __init__(
        self,
        recipe: Recipe,
        groups: ProcessGroupCollection,
        *,
        name: str = "",
        count: int,
        place: tuple[int, int] | None,
    ) -> None:
        super().__init__()
        self.first = Fp8Product(recipe, groups, name=f"{name}.w1", count=count, place=place)
        self.second = Fp8Product(recipe, groups, name=f"{name}.w2", count=count, place=place)

    def forward(self, tokens: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        """Arguments and result as for `feed_forward`: [L, M, H], [L, H, 2, F], [L, F, H] -> [L, M, H]."""
        gate_up = self.first(tokens, w1.view(*w1.shape[:2], -1))
        output: Tensor = self.second(swiglu(gate_up, fused=False), w2)
        return output


def attach(model: Any, config: Config, groups: ProcessGroupCollection) -> None:
    """Give the linears of attention and feed-forward in a model chunk their FP8 products, layer by layer.

    Args:
        model: a GPTModel whose linears are of the classes above.
        config: `precision`; nothing happens without emulation.
        groups: process groups of this rank.
    """
    precision = config.precision
    if not precision.emulated:
        return
    recipe = Recipe.of(config)
    last = config.model.num_layers - precision.fp8_skip_last
    for layer in model.decoder.layers:
        number = layer.layer_number - 1
        if not precision.fp8_skip_first <= number < last:
            continue
        for path, module in list(layer.named_modules()):
            name = f"decoder.layers.{number}.{path}"
            if isinstance(module, Fp8ColumnParallelLinear | Fp8RowParallelLinear):
                module.fp8 = Fp8Product(recipe, groups, name=name)
            elif isinstance(module, UntiedLinear):
                own = {modality: Fp8Rows(recipe, groups, name=f"{name}.{modality}") for modality in config.vocab.names}
                module.use(nn.ModuleDict(own))
            elif isinstance(module, Experts):
                # Shared experts are dense parameters, which every rank holds.
                place = (module.own.start, module.count) if module.expert_parallel else None
                module.compute = Fp8FeedForward(  # type: ignore[assignment]
                    recipe, groups, name=name, count=len(module.own), place=place
                )
