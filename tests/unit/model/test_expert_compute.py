"""Every way to compute experts against a loop in fp64, and what a machine or a configuration refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmscale.config import Config
from mmscale.errors import ConfigError
from mmscale.model.expert_compute import ExpertCompute, Products, chosen, feed_forward, swiglu
from mmscale.runtime import device
from tests.unit.model.reference import moma_experts, tiny

WAYS = {
    f"{products}{'_fused' if fused else ''}": ExpertCompute(products, fused=fused)
    for products in (Products.BMM, Products.GROUPED_MM)
    for fused in (False, True)
}
# (L, N, H, F): rows of 16 bytes, as grouped_mm wants them; one row, more experts than rows, one expert.
SHAPES = [(3, 5, 16, 8), (4, 1, 8, 24), (1, 7, 8, 8), (2, 33, 24, 16)]


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and weights whose gates are neither saturated nor all alike."""
    experts, rows, hidden, inner = shape
    generator = torch.Generator().manual_seed(5)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype).requires_grad_()

    return draw(experts, rows, hidden), draw(experts, hidden, 2, inner), draw(experts, inner, hidden)


def loop(tokens: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """One row after another, in fp64."""
    tokens, w1, w2 = tokens.double(), w1.double(), w2.double()
    out = torch.zeros_like(tokens)
    for expert in range(tokens.shape[0]):
        for row in range(tokens.shape[1]):
            gate, up = tokens[expert, row] @ w1[expert, :, 0], tokens[expert, row] @ w1[expert, :, 1]
            out[expert, row] = (gate / (1 + torch.exp(-gate)) * up) @ w2[expert]
    return out


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_is_the_loop(way: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    given = inputs(shape, dtype)
    got, want = feed_forward(*given, compute=WAYS[way]), loop(*given)
    direction = torch.randn(want.shape, generator=torch.Generator().manual_seed(6)).to(dtype)
    mine = torch.autograd.grad(got, given, direction)
    exact = torch.autograd.grad(want, given, direction.double())
    # fp32: sums of at most 33 products of order one. bf16: 8 bits, rounded after each of two products and of SwiGLU.
    tolerance = 2e-6 if dtype is torch.float32 else 3e-2
    for name, found, reference in zip(("output", "tokens", "w1", "w2"), (got, *mine), (want, *exact), strict=True):
        assert found.dtype is dtype
        error = (found.double() - reference).norm() / reference.norm()
        assert error < tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("way", WAYS)
def test_an_expanded_gradient_is_no_trouble(way: str) -> None:
    """A plain sum's gradient has strides of 0, which grouped_mm's backward refuses."""
    given = inputs((3, 4, 8, 8), torch.float32)
    mine = torch.autograd.grad(feed_forward(*given, compute=WAYS[way]).sum(), given)
    exact = torch.autograd.grad(loop(*given).sum(), given)
    for found, reference in zip(mine, exact, strict=True):
        torch.testing.assert_close(found, reference.float(), rtol=2e-5, atol=2e-5)


def test_fused_swiglu_keeps_its_input_only() -> None:
    def kept(fused: bool) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        gate_up = torch.randn(4, 6, 20, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            swiglu(gate_up, fused=fused)
        return sum(sizes.values()) // (4 * 6 * 10 * 4)

    assert kept(True) == 2  # in widths of one projection: gate and up
    assert kept(False) == 3  # and silu(gate)


def with_experts(**experts: object) -> Config:
    return tiny(experts=moma_experts(**experts))


def test_auto_is_decided() -> None:
    assert not device.has_cuda(), "on CUDA SwiGLU is fused by default"
    assert chosen(with_experts()) == ExpertCompute(Products.BMM, fused=False, graph=False)
    assert chosen(with_experts(compute="grouped_mm", fused_swiglu=True)) == ExpertCompute(
        Products.GROUPED_MM, fused=True
    )


@pytest.mark.parametrize(
    ("experts", "cause"),
    [
        ({"cuda_graph": True}, "model.experts.cuda_graph: this machine has no CUDA device"),
        ({"compute": "te"}, "model.experts.compute = te"),
    ],
)
def test_what_this_machine_cannot_do(experts: dict[str, object], cause: str) -> None:
    with pytest.raises(ConfigError, match=cause) as caught:
        chosen(with_experts(**experts))
    assert caught.value.remedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_has_the_bits_of_autograd(dtype: torch.dtype) -> None:
    gate_up = inputs((3, 5, 16, 24), dtype)[0]
    direction = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(6)).to(dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    wanted = torch.nn.functional.silu(gate) * up
    found = swiglu(gate_up, fused=False)
    assert torch.equal(found, wanted)
    exact = torch.autograd.grad(wanted, gate_up, direction)
    assert torch.equal(*torch.autograd.grad(found, gate_up, direction), *exact)
