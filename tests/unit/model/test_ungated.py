"""Groups of one expert without a router: against the reference in loops, and what that does not show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel

from mmscale.config import Config, ModalityVocab
from mmscale.config.rules import violations
from mmscale.model.mixed_modal import MixedModalParams
from mmscale.plan import count_parameters
from tests.unit.model.comparison import assert_agrees, gradients, params_of, run_model
from tests.unit.model.reference import (
    IMAGE_IDS,
    TEXT_IDS,
    batch_of,
    depth,
    moma_experts,
    random_documents,
    tiny,
    usual_batch,
)

UNGATED = ["image"]
THREE = {"text": 0.5, "image": 0.25, "speech": 0.25}
MODELS: dict[str, Config] = {
    "plain": tiny(experts=moma_experts(ungated=UNGATED)),
    "untied": tiny(untie=["attention", "norms"], experts=moma_experts(ungated=UNGATED, shared=1)),
    "post_depth": tiny(norm="post", depth=depth(), experts=moma_experts(ungated=UNGATED, capacity="actual")),
    "norms_depth_per_modality": tiny(
        norm="post_per_expert", depth=depth("per_modality"), experts=moma_experts(ungated=UNGATED, shared=1)
    ),
    "multiple": tiny(experts=moma_experts(ungated=UNGATED, capacity_multiple=4, scope="micro_batch")),
    "token_choice": tiny(
        experts=moma_experts(ungated=UNGATED, token_choice={"top_k": 2}), untie=["attention"], norm="post"
    ),
    "two_of_three": tiny(
        more=(ModalityVocab(name="speech", size=9),),
        experts=moma_experts(
            counts={"text": 3, "image": 1, "speech": 1}, share=THREE, ungated=["speech", "image"], shared=1
        ),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_the_reference(name: str, build: Callable[..., GPTModel]) -> None:
    batch = usual_batch()
    if len(MODELS[name].vocab.names) == 3:  # every second image token becomes one of speech
        speech = (batch.modality == 1) & (batch.ids % 2 == 0)
        ids, modality = torch.where(speech, batch.ids + IMAGE_IDS, batch.ids), batch.modality.masked_fill(speech, 2)
        assert speech.any() and (modality == 1).any()
        batch = replace(batch, ids=ids.clamp(max=TEXT_IDS + IMAGE_IDS + 8), modality=modality)
    assert_agrees(build(MODELS[name]), MODELS[name], batch)


@pytest.mark.parametrize("image", [0.0, 1.0])
def test_a_batch_of_one_modality(image: float, build: Callable[..., GPTModel]) -> None:
    """The gradient of the other's expert is exactly zero, not None; all images are more than any nominal share."""
    config = MODELS["plain"]
    model, batch = build(config), batch_of([random_documents((12,), seed=1, image=image)], length=12)
    found = gradients(model, run_model(model, batch).square().sum())
    for name, gradient in found.items():
        if ".ungated." in name:
            assert bool(gradient.any()) == (image == 1.0), name
    assert_agrees(model, config, batch)


@pytest.mark.parametrize("name", ["multiple", "norms_depth_per_modality"])
def test_counts_of_the_host_change_nothing(name: str, build: Callable[..., GPTModel]) -> None:
    """They are an upper bound of the tokens, whose other slots are empty."""
    model, batch = build(MODELS[name]), usual_batch()
    expected = run_model(model, batch)
    facts: MixedModalParams = params_of(batch)
    facts.counts = None
    torch.testing.assert_close(model(batch.ids, batch.position, None, packed_seq_params=facts), expected)


def test_it_has_nothing_that_routes() -> None:
    """Neither router nor auxiliary router, bias nor cut-off: its tensors are two matrices a layer."""
    model = {"auxiliary": {"mode": "joint"}, "num_layers": 1}
    gated = tiny(experts=moma_experts(threshold_decay=0.9), **model)
    ungated = tiny(experts=moma_experts(threshold_decay=0.9, ungated=UNGATED), **model)
    one, other = count_parameters(gated), count_parameters(ungated)
    width = gated.model.hidden_size
    inner = gated.model.auxiliary_width
    assert inner is not None
    assert one.total - other.total == width + (width + 1) * inner  # a row of the router; its auxiliary router
    assert other.experts == 3 * 3 * width * gated.model.ffn_hidden_size


@pytest.mark.parametrize(
    ("experts", "kind", "said"),
    [
        ({"ungated": ["text"]}, "moma", "names text, which is no modality's group of one expert"),
        ({"ungated": ["speech"]}, "moma", "names speech, which is no modality's group of one expert"),
        ({"ungated": ["image", "image"]}, "moma", "names a group twice"),
        ({"counts": {"text": 1, "image": 1}, "ungated": ["image", "text"]}, "moma", "no group is left"),
        ({"counts": {"any": 1}, "ungated": ["any"]}, "moe", "names any, which is no modality's group"),
        ({"counts": {}, "ungated": ["image"]}, "dense", "model.experts.ungated is set, but model.kind = dense"),
    ],
)
def test_what_is_refused(experts: dict[str, Any], kind: str, said: str) -> None:
    config = tiny(kind, experts=moma_experts(**experts))
    assert any(said in problem.cause for problem in violations(config))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"precision": {"dtype": "bf16", "fp8": "delayed"}}, "precision.fp8 = delayed"),
        ({"model": {"backend": "te"}}, "model.backend = te"),
        ({"model": {"experts": {"compute": "te"}}}, "model.experts.compute = te"),
    ],
)
def test_without_transformer_engine_only(other: dict[str, Any], said: str) -> None:
    given = tiny(experts=moma_experts(ungated=UNGATED)).model_dump()
    model = given["model"] | other.get("model", {})
    model["experts"] = given["model"]["experts"] | other.get("model", {}).get("experts", {})
    config = Config.model_validate(given | other | {"model": model})
    assert any(f"ungated with {said}" in problem.cause for problem in violations(config))


def test_expert_parallel_ranks_share_the_other_experts() -> None:
    config = tiny(experts=moma_experts(ungated=UNGATED))
    config = config.model_copy(update={"parallel": type(config.parallel)(ep=4)})
    assert any("3 experts altogether, without those of" in problem.cause for problem in violations(config))
