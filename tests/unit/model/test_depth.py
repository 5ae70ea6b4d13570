"""Mixture-of-Depths layers against the loops of reference.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from megatron.core.models.gpt import GPTModel

from mmscale.config import Config
from mmscale.model.layer import DepthLayer
from mmscale.model.mixed_modal import RoutingStats, means_over_layers
from mmscale.model.spec import depth_settings
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
from tests.unit.model.reference import Reference, batch_of, depth, moma_experts, random_documents, tiny, usual_batch
from tests.unit.model.reference_parts import choose_depth, depth_numbers

CHOICES = ("mixed", "per_modality")
POST = ("post", "post_per_expert")
UNEVEN = {"text": 0.7, "image": 0.3}
MODELS: dict[str, Config] = {
    **{f"{kind}_{choice}": tiny(kind, depth=depth(choice)) for kind in ("moe", "moma") for choice in CHOICES},
    "dense_mixed": tiny("dense", depth=depth()),
    **{f"{norm}_{choice}": tiny(norm=norm, depth=depth(choice)) for norm in POST for choice in CHOICES},
    "every_layer": tiny(num_layers=3, depth=depth(every=1, capacity=0.25, multiple=1)),
    "every_third": tiny(num_layers=4, depth=depth(every=3)),
    "all_tokens": tiny(depth=depth(capacity=1.0)),
    "one_token": tiny(depth=depth("per_modality", capacity=0.01, multiple=1)),
    "rounded_up": tiny(depth=depth(capacity=0.25, multiple=8)),
    **{
        f"actual_{choice}_{scope}": tiny(
            depth=depth(choice), experts=moma_experts(share=UNEVEN, capacity="actual", scope=scope)
        )
        for choice in CHOICES
        for scope in ("sequence", "micro_batch")
    },
    "gqa_shared_uneven": tiny(
        num_query_groups=2,
        depth=depth("per_modality"),
        experts=moma_experts(shared=1, share=UNEVEN, scope="micro_batch"),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_model_is_the_reference(name: str, build: Callable[..., GPTModel]) -> None:
    model = build(MODELS[name])
    settings = MODELS[name].model.depth
    assert settings is not None
    kinds = [isinstance(layer, DepthLayer) for layer in model.decoder.layers]
    assert kinds == [number % settings.every == 0 for number in range(len(kinds))]
    assert_agrees(model, MODELS[name], usual_batch())


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("image", [0.0, 1.0])
def test_one_modality_only(choice: str, image: float, build: Callable[..., GPTModel]) -> None:
    config = tiny(depth=depth(choice))
    model = build(config)
    batch = batch_of(
        [random_documents((12,), seed=1, image=image), random_documents((4,), seed=2, image=image)], length=12
    )
    assert_agrees(model, config, batch)
    grads = gradients(model, run_model(model, batch).square().sum())
    assert all(torch.isfinite(gradient).all() for gradient in grads.values())


@pytest.mark.parametrize("choice", CHOICES)
def test_others_skip_the_layer(choice: str, build: Callable[..., GPTModel]) -> None:
    """Unselected tokens keep every bit, selected ones change and are only seen by each other."""
    config = tiny(depth=depth(choice, capacity=0.34))
    model, batch = build(config), usual_batch()
    hidden = torch.randn(12, 2, 16, generator=torch.Generator().manual_seed(3))
    out = run_layer(model, 0, hidden, params_of(batch))
    router = weights_of(model)["decoder.layers.0.depth_router"]
    keep, quotas = depth_numbers(config)
    for b, facts in enumerate(facts_of(batch)):
        taken = choose_depth(torch.sigmoid(hidden[:, b] @ router).tolist(), facts.modality, keep, quotas)
        for token in range(12):
            assert torch.equal(out[token, b], hidden[token, b]) == (token not in taken)
    want = Reference(config, weights_of(model)).layer(0, list(hidden.unbind(1)), facts_of(batch))
    assert relative(out.detach(), torch.stack(want, dim=1)) < TOLERANCE


def test_control_the_score_matters(build: Callable[..., GPTModel]) -> None:
    """A reference whose depth router has the other sign chooses other tokens, and is noticed."""
    config = tiny(depth=depth())
    model, batch = build(config), usual_batch()
    weights = weights_of(model)
    weights["decoder.layers.0.depth_router"] = -weights["decoder.layers.0.depth_router"]
    assert relative(run_model(model, batch).detach(), Reference(config, weights).logits(batch)) > 0.01


@pytest.mark.parametrize("choice", CHOICES)
def test_sequences_do_not_depend_on_each_other(choice: str, build: Callable[..., GPTModel]) -> None:
    model, batch = build(tiny(depth=depth(choice))), usual_batch()
    whole = run_model(model, batch)
    for row in (0, 1):
        torch.testing.assert_close(run_model(model, batch.rows(row)), whole[row : row + 1], rtol=1e-5, atol=1e-5)


def test_documents_stay_apart_inside_the_selection(build: Callable[..., GPTModel]) -> None:
    """With all tokens selected, so that neighbours cannot change the choice, a document is what it is alone."""
    model = build(tiny("dense", depth=depth(capacity=1.0)))
    left, right = random_documents((5, 6), seed=4)
    alone = run_model(model, batch_of([[right]], length=12))[0, :6]
    packed = run_model(model, batch_of([[left, right]], length=12))[0, 5:11]
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("choice", CHOICES)
def test_figures_are_counts(choice: str, build: Callable[..., GPTModel]) -> None:
    config = tiny(depth=depth(choice))
    model, batch, stats = build(config), usual_batch(), RoutingStats()
    hidden = torch.randn(12, 2, 16, generator=torch.Generator().manual_seed(5))
    run_layer(model, 0, hidden, params_of(batch, stats=stats))
    router = weights_of(model)["decoder.layers.0.depth_router"]
    keep, quotas = depth_numbers(config)
    taken, total = [0, 0], [0, 0]
    for b, facts in enumerate(facts_of(batch)):
        rows = choose_depth(torch.sigmoid(hidden[:, b] @ router).tolist(), facts.modality, keep, quotas)
        for modality in (0, 1):
            taken[modality] += sum(facts.modality[row] == modality for row in rows)
            total[modality] += facts.modality.count(modality)
    means = means_over_layers([stats.read()])
    for modality, name in enumerate(("text", "image")):
        assert means[f"depth/selected_fraction/{name}"] == pytest.approx(taken[modality] / total[modality])


@pytest.mark.parametrize(
    ("capacity", "multiple", "keep", "quotas"),
    [(0.5, 2, 6, (4, 1)), (0.25, 8, 8, (5, 2)), (1.0, 5, 12, (8, 3)), (0.1, 1, 2, (1, 0))],
)
def test_numbers(capacity: float, multiple: int, keep: int, quotas: tuple[int, int]) -> None:
    config = tiny(depth=depth("per_modality", capacity=capacity, multiple=multiple), experts=moma_experts(share=UNEVEN))
    settings = depth_settings(config)
    assert (settings.keep, settings.quotas) == (keep, quotas)
    assert depth_numbers(config) == (keep, quotas)
    assert depth_settings(tiny(depth=depth())).quotas is None
