"""On a GPU: bytes of FP8, experts, training under every recipe, checkpoints; the limits are the benchmark's."""

from __future__ import annotations

import pytest
import torch

from mmscale.bench import gpu_checks
from mmscale.bench.gpu_kernels import RECIPES
from mmscale.bench.gpu_session import Session
from mmscale.bench.gpu_shapes import TINY
from mmscale.model.attention import DocumentAttention
from mmscale.model.build import build_chunks, transformer_config
from mmscale.model.expert_compute import Products
from mmscale.model.mixed_modal import MixedModalParams
from mmscale.runtime import device, groups

te = pytest.mark.needs_te


@pytest.mark.parametrize("products", [Products.BMM, Products.GROUPED_MM])
def test_experts_are_near_fp64(session: Session, products: Products) -> None:
    assert gpu_checks.experts_error(session, products)[0] < gpu_checks.EXPERTS_BF16


@te
@pytest.mark.parametrize("recipe", ["off", *RECIPES])
def test_transformer_engines_experts_are_near_fp64(session: Session, recipe: str) -> None:
    error, _ = gpu_checks.te_experts_error(session, recipe)
    assert error < (gpu_checks.EXPERTS_BF16 if recipe == "off" else gpu_checks.EXPERTS_FP8)
    assert recipe == "off" or error > 0.01, "this is no FP8"


@te
@pytest.mark.parametrize("kind", ["tensorwise", "rows of 128", "tiles of 128"])
def test_bytes_of_fp8_are_those_of_the_formulas(session: Session, kind: str) -> None:
    share, note = gpu_checks.quantized_bytes(f"bytes of e4m3, {kind}")
    assert share == 0.0, note


@te
@pytest.mark.parametrize("recipe", ["off", *RECIPES])
def test_a_recipe_learns_and_follows_the_torch_backend(session: Session, begun: gpu_checks.Begun, recipe: str) -> None:
    config = gpu_checks.toy(session, "te", recipe)
    found = gpu_checks.train(config, *gpu_checks.parts_of(config), until=20)
    assert found[-1] < 0.9 * found[0]
    apart, note = gpu_checks.follows(session, begun, "te", recipe)
    assert apart < gpu_checks.LOSS, note


@pytest.mark.parametrize(
    ("backend", "recipe"),
    [("torch", "off"), pytest.param("te", "off", marks=te), pytest.param("te", "delayed", marks=te)],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(session: Session, backend: str, recipe: str) -> None:
    assert gpu_checks.resumed(gpu_checks.toy(session, backend, recipe))[0] <= gpu_checks.SAME


def test_a_run_of_a_cpu_goes_on_here(session: Session) -> None:
    assert gpu_checks.from_cpu()[0] <= gpu_checks.ACROSS


@te
def test_fused_attention_stays_within_documents(one_rank: None) -> None:
    config = TINY.config("dense", layers=1, dtype="bf16", backend="te", fusion="off")
    fused = build_chunks(config, groups.collection())[0].decoder.layers[0].self_attention.core_attention
    plain = DocumentAttention(transformer_config(config), 1)
    where, generator = device.taken(), torch.Generator().manual_seed(5)
    documents = torch.randint(0, 2, (2, 64), generator=generator).cumsum(1).to(where)
    zeros = torch.zeros_like(documents)
    q, k, v = (torch.randn(64, 2, 4, 16, generator=generator).to(where, torch.bfloat16) for _ in range(3))
    for tensor in (q, k, v):
        tensor.requires_grad_()
    for bound in (None, 140):  # with empty documents at the end
        params = MixedModalParams.of(modality_ids=zeros, position_ids=zeros, document_ids=documents, documents=bound)
        results = []
        for attention in (plain, fused):
            out = attention(q, k, v, packed_seq_params=params)
            results.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
        for mine, other in zip(*results, strict=True):
            torch.testing.assert_close(mine.float(), other.float(), rtol=0.05, atol=0.05)
