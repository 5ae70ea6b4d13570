"""Implementations of the experts' matrix products: batched, grouped, fused or captured. All give the same result.

With static capacities every expert has the same number of rows, so no implementation needs counts from the device.
`mmscale bench experts` measures the implementations; docs/performance.md has the results. Transformer-Engine's grouped
linear has its own weights and is a module of experts_te.py.

Shapes: L experts on this rank, N rows of each, H hidden width, F inner width of this tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from megatron.core.fusions.fused_bias_swiglu import SwiGLUFunction
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mmscale.config import Config
from mmscale.errors import ConfigError
from mmscale.runtime import device, transformer_engine


class Products(StrEnum):
    """The implementation that multiplies the rows of all experts with their weights.

    BMM: one batched product (cuBLAS strided batched, or the host's BLAS for each expert).
    GROUPED_MM: torch.nn.functional.grouped_mm, one kernel over ragged groups.
    TE: Transformer-Engine's grouped linear, the only one with FP8 kernels.
    """

    BMM = "bmm"
    GROUPED_MM = "grouped_mm"
    TE = "te"


@dataclass(frozen=True)
class ExpertCompute:
    """The implementation for a group of experts on this machine, with `auto` resolved.

    Attributes:
        products: implementation of the products.
        fused: SwiGLU as one function that keeps only its input and recomputes the rest in backward; with CUDA
            torch.compile makes one kernel of each pass.
        graph: forward and backward of each group are captured as CUDA graphs.
    """

    products: Products = Products.BMM
    fused: bool = False
    graph: bool = False


BATCHED = ExpertCompute()


def chosen(config: Config) -> ExpertCompute:
    """Resolves `model.experts.compute`, `fused_swiglu` and `cuda_graph` for this machine.

    Raises:
        ConfigError: this machine or its version of torch does not support a requested option.
    """
    experts, cuda = config.model.experts, device.has_cuda()
    if experts.compute == "auto":
        # Only Transformer-Engine's experts have FP8 kernels; emulated FP8 is computed by torch.
        fp8 = config.precision.fp8 != "off" and not config.precision.emulated
        products = Products.TE if fp8 else Products.BMM
    else:
        products = Products(experts.compute)
    if products is Products.TE and experts.compute == "te":
        transformer_engine.require("model.experts.compute = te")
    if products is Products.GROUPED_MM:
        if not hasattr(F, "grouped_mm"):
            raise ConfigError(
                f"model.experts.compute = grouped_mm: torch {torch.__version__} has no torch.nn.functional.grouped_mm",
                remedy="use torch 2.10 or newer, or model.experts.compute=bmm",
            )
        if cuda and config.precision.dtype != "bf16":
            raise ConfigError(
                f"model.experts.compute = grouped_mm: on CUDA its kernels take bf16, not {config.precision.dtype}",
                remedy="use precision.dtype=bf16 or model.experts.compute=bmm",
            )
    if experts.cuda_graph and not cuda:
        raise ConfigError(
            "model.experts.cuda_graph: this machine has no CUDA device",
            remedy="set model.experts.cuda_graph=false",
        )
    fused = cuda if experts.fused_swiglu is None else experts.fused_swiglu
    return ExpertCompute(products, fused=fused, graph=experts.cuda_graph)


def swiglu(gate_up: Tensor, *, fused: bool) -> Tensor:
    """[..., gate F, up F] -> silu(gate) * up, [..., F].

    Unfused, the input, silu(gate) and the product are kept for backward; fused, the input and the product.
    """
    if fused:
        return SwiGLUFunction.apply(gate_up, False, False)
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up. Backward writes both gradients into one tensor; autograd would concatenate them."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        ctx.save_for_backward(gate_up, activated)
        return activated * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gate_up, activated = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_up)
        for_gate, for_up = result.chunk(2, dim=-1)
        torch.mul(gradients[0], activated, out=for_up)
        torch.ops.aten.silu_backward.grad_input(gradients[0] * up, gate, grad_input=for_gate)
        return result


def feed_forward(tokens: Tensor, w1: Tensor, w2: Tensor, *, compute: ExpertCompute) -> Tensor:
    """SwiGLU feed-forward of every expert on its own rows.

    Args:
        tokens: [L, N, H].
        w1: [L, H, 2, F], gate and up projection.
        w2: [L, F, H].
        compute: bmm or grouped_mm, and whether SwiGLU is fused.

    Returns:
        [L, N, H].
    """
    product = _PRODUCTS[compute.products]
    gate_up = product(tokens, w1.view(*w1.shape[:2], -1))
    return product(swiglu(gate_up, fused=compute.fused), w2)


def _grouped(rows: Tensor, weights: Tensor) -> Tensor:
    """[L, N, K] x [L, K, M] -> [L, N, M] through grouped_mm; the ends of the groups are made on the device."""
    experts, count, _ = rows.shape
    ends = torch.arange(1, experts + 1, dtype=torch.int32, device=rows.device) * count
    flat = F.grouped_mm(rows.reshape(experts * count, -1), weights, offs=ends)
    return _DenseGradient.apply(flat).view(experts, count, -1)


class _DenseGradient(torch.autograd.Function):
    """The identity; makes the gradient contiguous, because grouped_mm's backward refuses an expanded one."""

    @staticmethod
    def forward(ctx: object, tensor: Tensor) -> Tensor:
        del ctx
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        del ctx
        return gradients[0].contiguous()


_PRODUCTS: dict[Products, Callable[[Tensor, Tensor], Tensor]] = {
    Products.BMM: torch.bmm,
    Products.GROUPED_MM: _grouped,
}
