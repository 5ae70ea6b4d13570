"""RMSNorm and residual against their formulas, and what the norm's placement does to the router's gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mmscale.model.norm import Residual, RMSNorm
from tests.unit.model.comparison import facts_of, params_of, run_layer, weights_of
from tests.unit.model.reference import Reference, batch_of, moma_experts, random_documents, tiny
from tests.unit.model.reference_parts import rms_norm

EPS = 1e-5


def transformer(**settings: object) -> TransformerConfig:
    """A TransformerConfig of width 8."""
    return TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, layernorm_epsilon=EPS, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(8,), (1, 8), (5, 2, 8), (0, 8)])
def test_rms_norm_is_its_formula(shape: tuple[int, ...]) -> None:
    norm = RMSNorm(transformer(), 8, EPS)
    norm.weight.data = torch.linspace(-1.0, 2.0, 8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    got = norm(x)
    assert got.shape == x.shape
    if x.numel():
        torch.testing.assert_close(got.double(), rms_norm(x.double(), norm.weight.double(), EPS), rtol=1e-5, atol=1e-6)


def test_rms_norm_starts_at_one_and_survives_zeros() -> None:
    """Tokens that no expert took are rows of zeros."""
    norm = RMSNorm(transformer(), 8, EPS)
    assert torch.all(norm.weight == 1.0)
    x = torch.zeros(3, 8, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
    assert torch.all(norm(x) == 0.0)


def test_rms_norm_keeps_bf16_but_not_its_rounding() -> None:
    norm = RMSNorm(transformer(params_dtype=torch.bfloat16), 8, EPS)
    x = torch.full((1, 8), 3.0, dtype=torch.bfloat16)
    assert norm.weight.dtype is torch.bfloat16
    out = norm(x)
    assert out.dtype is torch.bfloat16 and torch.all(out == 1.0)


@pytest.mark.parametrize("replicated", [False, True])
def test_gradients_are_summed_over_tensor_parallel_ranks(replicated: bool) -> None:
    """Marked as partial wherever there are such ranks; of a gradient that is whole each of them gives its share."""
    norm = RMSNorm(transformer(tensor_model_parallel_size=2, sequence_parallel=True), 8, replicated=replicated)
    alone = RMSNorm(transformer(), 8, replicated=replicated)
    assert norm.weight.sequence_parallel is True
    assert alone.weight.sequence_parallel is False
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    for module in (norm, alone):
        module(x).square().sum().backward()
    assert norm.weight.grad is not None and alone.weight.grad is not None
    torch.testing.assert_close(norm.weight.grad, alone.weight.grad * (0.5 if replicated else 1.0), rtol=0, atol=0)


@pytest.mark.parametrize("normed", [True, False])
def test_residual(normed: bool) -> None:
    residual = Residual(transformer() if normed else None)
    x, skip = torch.randn(4, 8), torch.randn(4, 8)
    want = skip + (rms_norm(x, torch.ones(8), EPS) if normed else x)
    torch.testing.assert_close(residual(True, False)((x, None), skip, 0.0), want)
    torch.testing.assert_close(residual(False, False)((x, None), skip, 0.9), want)  # no dropout outside training
    dropped = residual(True, False)((x, None), skip, 0.5) - skip
    assert 0 < int((dropped == 0).sum()) < dropped.numel()


# --- placement and the router's gradient ----------------------------------------------------------------------------


def router_gradients(
    build: Callable[..., GPTModel], norm: str, *, shared: int = 0, eps: float = 1e-8
) -> dict[int, float]:
    """Size of the text router's gradient if the loss is over tokens that 0, 1 or 2 and more experts took (0, 1, 2)."""
    config = tiny(
        norm=norm, norm_eps=eps, num_layers=1, seq_length=24,
        experts=moma_experts(shared=shared, share={"text": 1.0, "image": 0.0}),
    )  # fmt: skip
    model = build(config)
    batch = batch_of([random_documents((24,), seed=5, image=0.0)], length=24)
    into: list[Tensor] = []
    model.decoder.layers[0].mlp.register_forward_pre_hook(lambda _, args: into.append(args[0].detach()))
    hidden = torch.randn(24, 1, 16, generator=torch.Generator().manual_seed(6))
    out = run_layer(model, 0, hidden, params_of(batch))[:, 0]

    chosen = Reference(config, weights_of(model)).gates("decoder.layers.0.", "text", [into[0][:, 0]], facts_of(batch))
    experts_of = torch.zeros(24, dtype=torch.int64)
    for _, _, token in chosen:
        experts_of[token] += 1
    direction = torch.randn(24, 16, generator=torch.Generator().manual_seed(8))
    router = model.decoder.layers[0].mlp.router.text
    sizes = {}
    for count in (0, 1, 2):
        tokens = experts_of.clamp(max=2) == count
        assert tokens.any(), "the batch has tokens of every sort"
        loss = (out[tokens] * direction[tokens]).sum()
        (gradient,) = torch.autograd.grad(loss, router, retain_graph=True)
        sizes[count] = float(gradient.norm())
    return sizes


def test_post_norm_hides_the_gate_of_single_experts(build: Callable[..., GPTModel]) -> None:
    """norm(g * FFN(x)) = norm(FFN(x)): only tokens of two or more experts train the router."""
    sizes = router_gradients(build, "post")
    assert sizes[0] == 0.0
    assert sizes[1] < 1e-5 * sizes[2]
    assert sizes[2] > 0.1


def test_post_norm_leaves_only_epsilon(build: Callable[..., GPTModel]) -> None:
    """Control: what is left of the single-expert gradient comes from epsilon and grows with it."""
    small, large = router_gradients(build, "post", eps=1e-5)[1], router_gradients(build, "post", eps=1e-2)[1]
    assert large > 100 * small


@pytest.mark.parametrize("norm", ["pre", "post_per_expert"])
def test_other_placements_train_the_router_by_every_token(norm: str, build: Callable[..., GPTModel]) -> None:
    sizes = router_gradients(build, norm)
    assert sizes[0] == 0.0
    assert sizes[1] > 0.1 and sizes[2] > 0.1


def test_a_shared_expert_brings_the_gate_back(build: Callable[..., GPTModel]) -> None:
    """norm(g * FFN(x) + shared(x)) depends on g."""
    assert router_gradients(build, "post", shared=1)[1] > 0.1
