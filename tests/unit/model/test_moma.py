"""MoMa layers and whole models against the loops of reference.py: dense, moe and moma, every norm placement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from scipy import stats as distributions
from torch import Tensor

from mmscale.config import Config, ExpertsConfig, ModalityVocab, ParallelConfig
from mmscale.model.ranking import RANKINGS
from mmscale.tables.settings import UNTIED as UNTIED_PARTS
from tests.unit.model.comparison import (
    TOLERANCE,
    assert_agrees,
    facts_of,
    gradients,
    params_of,
    relative,
    run_layer,
    run_model,
    weights_of,
)
from tests.unit.model.reference import (
    IMAGE_IDS,
    SHARE,
    TEXT_IDS,
    Reference,
    batch_of,
    depth,
    moma_experts,
    random_documents,
    tiny,
    usual_batch,
)

NORMS = ("pre", "post", "post_per_expert")
# Of the two angles of a head of 4, one is divided and one is kept.
SCALED = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0, "original_max_position_embeddings": 16}
# Of the four angles of a head of 8, one is kept, one divided, and two are mixed.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 4.0}
UNTIED = list(UNTIED_PARTS)
UNEVEN = {"text": 0.75, "image": 0.25}
MODELS: dict[str, Config] = {
    **{f"{kind}_{norm}": tiny(kind, norm=norm) for kind in ("dense", "moe", "moma") for norm in NORMS},
    **{f"shared_{norm}": tiny(norm=norm, experts=moma_experts(shared=2, shared_ffn_hidden_size=10)) for norm in NORMS},
    "dense_gqa": tiny("dense", num_query_groups=2),
    "dense_mqa_wide_heads": tiny("dense", num_query_groups=1, kv_channels=6),
    "dense_plain": tiny("dense", qk_norm=False, tie_embeddings=True, rope_base=500.0, norm_eps=1e-3),
    "dense_qwen2": tiny("dense", qk_norm=False, qkv_bias=True, num_query_groups=2),
    "dense_llama3": tiny("dense", qk_norm=False, rope_scaling=SCALED),
    "dense_linear": tiny("dense", rope_scaling={"rope_type": "linear", "factor": 2.5}),
    "dense_yarn": tiny("dense", qk_norm=False, kv_channels=8, rope_base=100.0, rope_scaling=YARN),
    "moma_yarn_attention_factor": tiny(
        kv_channels=8, rope_base=100.0, rope_scaling=YARN | {"attention_factor": 1.5, "truncate": False}
    ),
    "moma_biased_scaled": tiny(qkv_bias=True, rope_scaling=SCALED, norm="post"),
    **{f"mot_{norm}": tiny("dense", norm=norm, untie=UNTIED) for norm in NORMS},
    **{f"untied_{part}": tiny("dense", norm="post", untie=[part], num_query_groups=2) for part in UNTIED},
    "moma_untied": tiny(untie=["attention", "norms"], norm="post", num_query_groups=2),
    "moma_final_norm": tiny(untie=["final_norm"], norm="post_per_expert"),
    "moe_untied": tiny("moe", untie=["attention", "norms"], qk_norm=False),
    "mot_depth": tiny("dense", untie=UNTIED, depth=depth()),
    "moma_gqa_tied": tiny(num_query_groups=2, tie_embeddings=True),
    "moma_no_qk_norm": tiny(qk_norm=False),
    "moma_uneven_share": tiny(experts=moma_experts(share=UNEVEN, capacity_factor=1.3)),
    "moma_whole_capacity": tiny(experts=moma_experts(capacity_factor=2.0)),
    "moma_little_capacity": tiny(experts=moma_experts(capacity_factor=0.1)),
    "moma_multiple": tiny(experts=moma_experts(capacity_multiple=4)),
    "moma_micro_batch": tiny(norm="post", experts=moma_experts(scope="micro_batch", share=UNEVEN)),
    "moe_micro_batch_shared": tiny(
        "moe", experts=ExpertsConfig(counts={"any": 5}, share=SHARE, scope="micro_batch", shared=1)
    ),
    **{
        f"{choice}_{kind}": tiny(
            kind,
            experts=ExpertsConfig(
                counts={"text": 3, "image": 2} if kind == "moma" else {"any": 4},
                share=UNEVEN,
                choice=choice,
                scope="micro_batch" if kind == "moe" else "sequence",
            ),
        )
        for choice in RANKINGS
        if choice != "sigmoid"
        for kind in ("moma", "moe")
    },
    "actual": tiny(experts=moma_experts(capacity="actual")),
    "actual_micro_batch": tiny(
        experts=moma_experts(capacity="actual", scope="micro_batch", capacity_factor=1.4, choice="competitive")
    ),
    "actual_multiple": tiny(experts=moma_experts(capacity="actual", capacity_multiple=4)),
    "actual_moe": tiny("moe", experts=ExpertsConfig(counts={"any": 5}, share=SHARE, capacity="actual")),
    "one_expert_each": tiny(norm="post", experts=moma_experts(counts={"text": 1, "image": 1})),
    "one_layer_odd_length": tiny(
        num_layers=1, seq_length=12, ffn_hidden_size=7, experts=moma_experts(counts={"text": 2, "image": 5})
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_model_is_the_reference(name: str, build: Callable[..., GPTModel]) -> None:
    assert_agrees(build(MODELS[name]), MODELS[name], usual_batch())


@pytest.mark.parametrize(
    "broken",
    [
        {"norm": "post"},
        {"qk_norm": False},
        {"rope_base": 100.0},
        {"norm_eps": 1e-2},
        {"experts": moma_experts(capacity_factor=0.5)},
        {"experts": moma_experts(scope="micro_batch")},
    ],
    ids=lambda broken: "-".join(broken),
)
def test_the_comparison_notices(broken: dict[str, object], build: Callable[..., GPTModel]) -> None:
    """Control: a reference of another configuration does not agree."""
    model, batch = build(tiny()), usual_batch()
    own = run_model(model, batch)
    names = weights_of(model)
    for kind, attention in (("input_layernorm", "self_attn_bda.norm"), ("pre_mlp_layernorm", "mlp_bda.norm")):
        names |= {name.replace(kind, attention): value for name, value in names.items() if kind in name}
    other = Reference(tiny(**broken), names).logits(batch)  # type: ignore[arg-type]
    assert relative(own, other) > 100 * TOLERANCE


@pytest.mark.parametrize("kind", ["moe", "moma"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("image", [0.0, 1.0])
def test_one_modality_only(kind: str, norm: str, image: float, build: Callable[..., GPTModel]) -> None:
    """Every parameter gets a gradient tensor, without NaN: DDP waits for each of them."""
    config = tiny(kind, norm=norm)
    model = build(config)
    batch = batch_of(
        [random_documents((12,), seed=1, image=image), random_documents((7,), seed=2, image=image)], length=12
    )
    assert_agrees(model, config, batch)
    grads = gradients(model, run_model(model, batch).square().sum())
    assert all(torch.isfinite(gradient).all() for gradient in grads.values())
    if kind == "moma":
        absent, present = ("image", "text") if image == 0.0 else ("text", "image")
        for layer in (0, 1):
            assert torch.all(grads[f"decoder.layers.{layer}.mlp.experts.{absent}.w1"] == 0.0)
            assert grads[f"decoder.layers.{layer}.mlp.experts.{present}.w1"].abs().max() > 0.0


def test_sequences_of_one_token(build: Callable[..., GPTModel]) -> None:
    """A group with one token in the whole micro-batch; groups in another order than the vocabulary."""
    config = tiny(experts=moma_experts(counts={"image": 2, "text": 1}))
    assert_agrees(build(config), config, batch_of([[[3]], [[25]]], length=12))


@pytest.mark.parametrize("kind", ["moe", "moma"])
def test_three_modalities(kind: str, build: Callable[..., GPTModel]) -> None:
    """Stated as possible in MoMa 2.1, tried there with two."""
    share = {"text": 0.4, "image": 0.4, "audio": 0.2}
    counts = {"text": 2, "image": 3, "audio": 1} if kind == "moma" else {"mixed": 3}
    config = tiny(
        kind,
        more=(ModalityVocab(name="audio", size=5),),
        experts=ExpertsConfig(counts=counts, share=share),
        depth=depth("per_modality"),
    )
    batch = usual_batch()
    audio = (batch.ids % 3 == 1) & (batch.modality >= 0)
    ids = torch.where(audio, TEXT_IDS + IMAGE_IDS + batch.ids % 5, batch.ids)
    batch = replace(batch, ids=ids, modality=batch.modality.masked_fill(audio, 2))
    assert {int(value) for value in batch.modality.unique()} == {-1, 0, 1, 2}
    assert_agrees(build(config), config, batch)


@pytest.mark.parametrize("kind", ["dense", "moe", "moma"])
def test_sequences_do_not_depend_on_each_other(kind: str, build: Callable[..., GPTModel]) -> None:
    model, batch = build(tiny(kind)), usual_batch()
    whole = run_model(model, batch)
    for row in (0, 1):
        torch.testing.assert_close(run_model(model, batch.rows(row)), whole[row : row + 1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run_model(model, batch.rows(1, 0)), whole.flip(0), rtol=1e-5, atol=1e-5)


def test_with_micro_batch_scope_they_do(build: Callable[..., GPTModel]) -> None:
    """Control of the test above, and what the documentation of `scope` says."""
    model, batch = build(tiny(experts=moma_experts(scope="micro_batch"))), usual_batch()
    assert (run_model(model, batch.rows(0)) - run_model(model, batch)[:1]).abs().max() > 0.01


# --- recompute and dtype --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute": "full"},
        {"recompute": "selective"},
        {"recompute": "selective", "recompute_modules": ["mlp"]},
        {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]},
    ],
    ids=["full", "core_attn", "mlp", "core_attn+mlp"],
)
def test_recompute_changes_nothing(recompute: dict[str, Any], build: Callable[..., GPTModel]) -> None:
    """Router noise included: backward must see the noise that forward saw. Two micro-batches are in flight."""
    settings = {"experts": moma_experts(noise="gumbel", shared=1), "norm": "post_per_expert", "depth": depth()}
    first = usual_batch()
    second = batch_of([random_documents((12,), seed=11), random_documents((3, 8), seed=12)], length=12)
    results = []
    for parallel in ({}, recompute):
        config = tiny(**settings)  # type: ignore[arg-type]
        config = config.model_copy(update={"parallel": ParallelConfig.model_validate(parallel)})
        model = build(config).train()
        loss = (
            run_model(model, first, noise_key=3).square().sum() + run_model(model, second, noise_key=4).square().sum()
        )
        results.append((loss.detach(), gradients(model, loss)))
    (plain, grads), (again, regrads) = results
    torch.testing.assert_close(again, plain)
    for name, gradient in grads.items():
        assert relative(regrads[name], gradient) < TOLERANCE, name


@pytest.mark.parametrize("kind", ["dense", "moe", "moma"])
@pytest.mark.parametrize("norm", NORMS)
def test_bf16_runs(kind: str, norm: str, build: Callable[..., GPTModel]) -> None:
    experts = moma_experts(shared=1) if kind == "moma" else None
    config = tiny(kind, norm=norm, dtype="bf16", experts=experts)
    model, batch = build(config), usual_batch()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    logits = run_model(model, batch)
    assert logits.dtype is torch.bfloat16
    grads = gradients(model, logits.float().square().sum())
    assert all(torch.isfinite(gradient).all() for gradient in grads.values())
    if kind == "dense":  # rounding may change an expert's choice, so only the dense model can be compared
        want = Reference(config, {name: weight.double() for name, weight in weights_of(model).items()}).logits(batch)
        assert relative(logits.detach(), want) < 0.05  # eps of bf16 is 0.008


def test_bf16_router_and_combination_are_fp32(build: Callable[..., GPTModel]) -> None:
    """Given its rounded weights and input, a MoMa layer's choice and sum are exact up to the experts' own rounding."""
    config = tiny(dtype="bf16")
    model, batch = build(config), usual_batch()
    layer = model.decoder.layers[0].mlp
    hidden = torch.randn(12, 2, 16, generator=torch.Generator().manual_seed(4)).bfloat16()
    got, bias = layer(hidden, padding_mask=params_of(batch))
    assert got.dtype is torch.bfloat16 and bias is None
    weights = {name: weight.double() for name, weight in weights_of(model).items()}
    want = Reference(config, weights).moma("decoder.layers.0.", list(hidden.double().unbind(1)), facts_of(batch))
    assert relative(got.detach(), torch.stack(want, dim=1)) < 0.02


# --- noise ----------------------------------------------------------------------------------------------------------


def noise_of(model: GPTModel, layer: int, key: int) -> Tensor:
    """What a layer adds to its router's logits."""
    mlp = model.decoder.layers[layer].mlp
    batch = batch_of([random_documents((12,), seed=s) for s in range(60)], length=12)
    hidden = torch.randn(12, 60, 16, generator=torch.Generator().manual_seed(0))
    noisy = mlp._router_logits(hidden, params_of(batch, noise_key=key))
    weight = torch.cat(tuple(mlp.router.parameters()))
    return (noisy - hidden @ weight.t()).detach()


def with_seed(config: Config, seed: int) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})})


def test_noise_is_only_in_training_and_a_function_of_seed_layer_and_key(build: Callable[..., GPTModel]) -> None:
    model = build(tiny(experts=moma_experts(noise="gumbel"))).train()
    first = noise_of(model, 0, 1)
    torch.testing.assert_close(noise_of(model, 0, 1), first)
    assert distributions.kstest(first.reshape(-1).numpy(), "logistic").pvalue > 0.01  # 2,880 samples
    for other in (noise_of(model, 1, 1), noise_of(model, 0, 2)):
        assert abs(torch.corrcoef(torch.stack((first.reshape(-1), other.reshape(-1))))[0, 1]) < 0.1
    other_seed = build(with_seed(tiny(experts=moma_experts(noise="gumbel")), 1235)).train()
    different = noise_of(other_seed, 0, 1)
    assert abs(torch.corrcoef(torch.stack((first.reshape(-1), different.reshape(-1))))[0, 1]) < 0.1
    assert noise_of(model.eval(), 0, 1).abs().max() < 1e-5
    assert noise_of(build(tiny()).train(), 0, 1).abs().max() < 1e-5


def test_noise_moves_choice_and_gate(build: Callable[..., GPTModel]) -> None:
    model, batch = build(tiny(experts=moma_experts(noise="gumbel"))), usual_batch()
    plain = run_model(build(tiny()), batch)
    torch.testing.assert_close(run_model(model.eval(), batch, noise_key=1), plain)
    trained = run_model(model.train(), batch, noise_key=1)
    torch.testing.assert_close(run_model(model, batch, noise_key=1), trained)
    assert (trained - plain).abs().max() > 0.01
    assert (run_model(model, batch, noise_key=2) - trained).abs().max() > 0.01


def test_tokens_no_expert_took_pass_unchanged(build: Callable[..., GPTModel]) -> None:
    """With little capacity some tokens get nothing from the feed-forward slot, and padding never does."""
    config = tiny(experts=moma_experts(capacity_factor=0.5))
    model, batch = build(config), usual_batch()
    hidden = torch.randn(12, 2, 16, generator=torch.Generator().manual_seed(2))
    out, _ = model.decoder.layers[0].mlp(hidden, padding_mask=params_of(batch))
    reference = Reference(config, weights_of(model))
    taken = set()
    for group in ("text", "image"):
        chosen = reference.gates("decoder.layers.0.", group, list(hidden.unbind(1)), facts_of(batch))
        taken |= {(b, i) for _, b, i in chosen}
    places = {(b, i) for b in range(2) for i in range(12)}
    assert taken and {(1, 9), (1, 10), (1, 11)} <= places - taken
    for b, i in places:
        assert bool((out[i, b] == 0.0).all()) == ((b, i) not in taken)


def test_layer_is_the_reference_on_any_input(build: Callable[..., GPTModel]) -> None:
    """One layer by itself, with inputs ten times as large as an embedding's."""
    config = tiny(norm="post_per_expert", experts=moma_experts(shared=1))
    model, batch = build(config), usual_batch()
    hidden = 10 * torch.randn(12, 2, 16, generator=torch.Generator().manual_seed(1))
    got = run_layer(model, 1, hidden, params_of(batch))
    want = Reference(config, {name: weight.double() for name, weight in weights_of(model).items()}).layer(
        1, list(hidden.double().unbind(1)), facts_of(batch)
    )
    assert relative(got.detach(), torch.stack(want, dim=1)) < TOLERANCE


def test_modality_comes_from_the_facts_not_from_ids(build: Callable[..., GPTModel]) -> None:
    """Control that groups matter: the same tokens declared to be of the other modality give something else."""
    model, batch = build(tiny()), usual_batch()
    swapped = replace(batch, modality=torch.where(batch.modality >= 0, 1 - batch.modality, batch.modality))
    assert (run_model(model, swapped) - run_model(model, batch)).abs().max() > 0.1
