"""Token choice: the functions against plain loops and megatron-core's, models against reference.py, causality."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe import moe_utils
from torch import Tensor

from mmscale.config import Config, ExpertsConfig, ModalityVocab
from mmscale.model.mixed_modal import RoutingStats, means_over_layers
from mmscale.model.step_sums import Loads
from mmscale.model.token_choice import SCORES, balance, best_experts, earliest, gates
from mmscale.tables.routings import Routing
from tests.unit.model.comparison import assert_agrees, gradients, params_of, run_model
from tests.unit.model.reference import (
    IMAGE_IDS,
    SHARE,
    TEXT_IDS,
    Batch,
    batch_of,
    depth,
    moma_experts,
    random_documents,
    tiny,
    usual_batch,
)
from tests.unit.model.routing_oracles import Problem, problems

quick = settings(max_examples=50, deadline=None, derandomize=True)


def experts(counts: dict[str, int] | None = None, **choice: Any) -> ExpertsConfig:
    more = {"counts": counts} if counts else {}
    return moma_experts(**more, token_choice=choice)


def mixed(count: int, *, scope: str = "sequence", shared: int = 0, **choice: Any) -> ExpertsConfig:
    return ExpertsConfig.model_validate(
        {"counts": {"any": count}, "share": SHARE, "scope": scope, "shared": shared, "token_choice": choice}
    )


PAIRS = {"text": 3, "image": 2}
MODELS: dict[str, Config] = {
    **{f"top1_{scores}": tiny(experts=experts(scores=scores)) for scores in SCORES},
    **{f"top2_{scores}": tiny(norm="post", experts=experts(PAIRS, scores=scores, top_k=2)) for scores in SCORES},
    "limited": tiny(experts=experts(PAIRS, top_k=2, capacity_factor=0.6)),
    "moe_limited_micro_batch": tiny(
        "moe", experts=mixed(5, scope="micro_batch", shared=1, top_k=3, capacity_factor=0.5), num_query_groups=2
    ),
    "per_expert_norms": tiny(norm="post_per_expert", experts=mixed(4, top_k=2), kind="moe"),
    "untied_depth": tiny(depth=depth(), untie=["attention", "norms"], experts=experts(PAIRS, top_k=2)),
}


def with_biases(model: GPTModel) -> GPTModel:
    """Biases that change many choices."""
    generator = torch.Generator().manual_seed(5)
    for name, buffer in model.named_buffers():
        if "router_bias" in name:
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model


# --- functions --------------------------------------------------------------------------------------------------------


def score(logits: list[float], scores: str) -> list[float]:
    if scores == "sigmoid":
        return [1 / (1 + math.exp(-logit)) for logit in logits]
    total = math.fsum(map(math.exp, logits))
    return [math.exp(logit) / total for logit in logits]


def chosen(problem: Problem, bias: list[float], top_k: int, scores: str) -> set[tuple[int, int]]:
    """(expert, token) of every choice, one token at a time; of equal experts the first."""
    taken = set()
    for token in range(problem.length * problem.batch):
        if problem.of_token(problem.member, token):
            values = score(problem.logits[token // problem.batch][token % problem.batch], scores)
            order = sorted(range(problem.experts), key=lambda e, v=values: (-round(v[e] + bias[e], 6), e))
            taken |= {(expert, token) for expert in order[:top_k]}
    return taken


def pairs(taken: Tensor) -> set[tuple[int, int]]:
    """(expert, token) of a mask [S, B, E]."""
    return {(e, t) for t, e in taken.flatten(0, 1).nonzero().tolist()}


def of(problem: Problem, data: st.DataObject) -> tuple[list[float], int, str]:
    """Biases, among them equal ones and such that outweigh scores; how many experts; the scores."""
    bias = [
        value / 100
        for value in data.draw(st.lists(st.integers(-60, 60), min_size=problem.experts, max_size=problem.experts))
    ]
    return bias, data.draw(st.integers(1, problem.experts)), data.draw(st.sampled_from(sorted(SCORES)))


def found(problem: Problem, bias: list[float], top_k: int, scores: str) -> tuple[Tensor, Tensor]:
    """Scores and choices as the model computes them, [S, B, E]."""
    values = SCORES[scores](torch.tensor(problem.logits))
    member = torch.tensor(problem.member).unsqueeze(-1)
    return values, best_experts(values, torch.tensor(bias), top_k) & member


@quick
@given(problems(), st.data())
def test_choices(problem: Problem, data: st.DataObject) -> None:
    bias, top_k, scores = of(problem, data)
    _, taken = found(problem, bias, top_k, scores)
    assert pairs(taken) == chosen(problem, bias, top_k, scores)


@quick
@given(problems(), st.data())
def test_gates_are_scores_without_the_bias(problem: Problem, data: st.DataObject) -> None:
    bias, top_k, scores = of(problem, data)
    values, taken = found(problem, bias, top_k, scores)
    got, want = gates(values, taken, top_k).flatten(0, 1), chosen(problem, bias, top_k, scores)
    for token in range(problem.length * problem.batch):
        own = score(problem.logits[token // problem.batch][token % problem.batch], scores)
        mine = [expert for expert in range(problem.experts) if (expert, token) in want]
        total = sum(own[expert] for expert in mine) if top_k > 1 else 1.0
        for expert in range(problem.experts):
            wanted = own[expert] / total if expert in mine else 0.0
            assert float(got[token, expert]) == pytest.approx(wanted, abs=1e-6)


@quick
@given(problems(), st.data())
def test_an_expert_keeps_its_earliest_tokens(problem: Problem, data: st.DataObject) -> None:
    bias, top_k, scores = of(problem, data)
    _, taken = found(problem, bias, top_k, scores)
    want = set()
    for scope in problem.scopes():
        for expert in range(problem.experts):
            own = [token for token in scope if (expert, token) in chosen(problem, bias, top_k, scores)]
            want |= {(expert, token) for token in own[: problem.capacity]}
    assert pairs(earliest(taken, problem.capacity, per_sequence=problem.per_sequence)) == want


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize(("scores", "biased"), [("sigmoid", True), ("sigmoid", False), ("softmax", False)])
def test_choices_and_gates_are_those_of_megatron_core(scores: str, top_k: int, biased: bool) -> None:
    """It has biases for sigmoid scores only."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(200, 6, generator=generator)
    bias = 0.2 * torch.randn(6, generator=generator) if biased else torch.zeros(6)
    probabilities, mask = moe_utils.topk_routing_with_score_function(
        logits,
        top_k,
        score_function=scores,
        # Switch multiplies by the probability among all experts, Mixtral by that among the chosen ones.
        use_pre_softmax=top_k == 1,
        expert_bias=bias if biased else None,
    )
    values = SCORES[scores](logits.unsqueeze(1))
    taken = best_experts(values, bias, top_k)
    assert torch.equal(taken.squeeze(1), mask.bool())
    torch.testing.assert_close(gates(values, taken, top_k).squeeze(1), probabilities, rtol=1e-6, atol=1e-7)


@quick
@given(st.lists(st.integers(0, 50), min_size=1, max_size=6))
def test_biases_move_against_the_load(loads: list[int]) -> None:
    bias = torch.linspace(-0.1, 0.1, len(loads))
    want = [float(b) + 0.01 * ((sum(loads) > n * len(loads)) - (sum(loads) < n * len(loads)))
            for b, n in zip(bias, loads, strict=True)]  # fmt: skip
    balance(bias, torch.tensor(loads, dtype=torch.float64), rate=0.01)
    assert bias.tolist() == pytest.approx(want, abs=1e-7)


def test_biases_are_those_of_megatron_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    monkeypatch.setattr(moe_utils.parallel_state, "get_tensor_and_data_parallel_group", lambda **_: None, raising=True)
    bias, loads = torch.tensor([0.1, -0.2, 0.0, 0.3]), torch.tensor([7.0, 0.0, 4.0, 5.0])
    want = moe_utils.get_updated_expert_bias(loads, bias, 0.001)
    balance(bias, loads.double(), rate=0.001)
    assert torch.equal(bias, want)


@pytest.mark.parametrize("order", [(0, 0, 1, 1), (0, 1, 0, 1)], ids=["recomputed", "recomputed in a pipeline"])
def test_a_repeated_choice_counts_once(order: tuple[int, ...]) -> None:
    """Recompute runs every layer twice; a pipeline has seen later micro-batches by then."""
    loads, bias, taken = Loads(), torch.zeros(2), torch.tensor([[[True, False]], [[True, True]]])
    for key in (*((1, "text", number) for number in order), (2, "text", 0)):
        loads.add(bias, taken, key=key)
    assert [sums.tolist() for _, sums in loads.sums.values()] == [[4.0, 2.0], [2.0, 1.0]]
    loads.clear()
    loads.add(bias, taken, key=(1, "text", 0))  # a step that is computed again
    assert [sums.tolist() for _, sums in loads.sums.values()] == [[2.0, 1.0]]


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_model_is_the_reference(name: str, build: Callable[..., GPTModel]) -> None:
    assert_agrees(with_biases(build(MODELS[name])), MODELS[name], usual_batch())


@pytest.mark.parametrize("image", [0.0, 1.0])
@pytest.mark.parametrize("limit", [None, 0.7])
def test_one_modality_only(image: float, limit: float | None, build: Callable[..., GPTModel]) -> None:
    config = tiny(experts=experts(PAIRS, top_k=2, capacity_factor=limit))
    batch = batch_of([random_documents((5, 4), seed=3, image=image)], length=12)
    model = with_biases(build(config))
    assert_agrees(model, config, batch)
    absent = "image" if image == 0.0 else "text"
    grads = gradients(model, run_model(model, batch).square().sum())
    assert all(not value.any() for name, value in grads.items() if f"experts.{absent}" in name)


def test_three_modalities(build: Callable[..., GPTModel]) -> None:
    counts = {"text": 2, "image": 3, "speech": 2}
    config = tiny(
        experts=ExpertsConfig.model_validate(
            {"counts": counts, "share": {"text": 0.5, "image": 0.3, "speech": 0.2}, "token_choice": {"top_k": 2}}
        ),
        more=(ModalityVocab(name="speech", size=9),),
    )
    batch = usual_batch()
    third = batch.ids % 3 == 1
    ids = torch.where(third, TEXT_IDS + IMAGE_IDS + batch.ids % 9, batch.ids)
    modality = torch.where(third, 2, batch.modality).to(torch.int8)
    assert_agrees(with_biases(build(config)), config, Batch(ids, modality, batch.position, batch.document))


@pytest.mark.parametrize("name", [name for name, config in MODELS.items() if config.model.depth is None])
def test_every_routing_mode_gives_the_same_and_no_later_token_matters(
    name: str, build: Callable[..., GPTModel]
) -> None:
    """In evaluation, where no token is dropped."""
    model = with_biases(build(MODELS[name])).eval()
    batch = batch_of([random_documents((12,), seed=4), random_documents((12,), seed=5)], length=12)
    with torch.no_grad():
        whole = run_model(model, batch)
        for routing in Routing:
            assert torch.equal(run_model(model, batch, routing=routing), whole)
        other = batch.ids.clone()
        other[:, 7:] = torch.where(other[:, 7:] >= TEXT_IDS, TEXT_IDS + (other[:, 7:] + 3) % IMAGE_IDS, 1)
        changed = run_model(model, Batch(other, batch.modality, batch.position, batch.document))
    torch.testing.assert_close(changed[:, :7], whole[:, :7], rtol=1e-6, atol=1e-6)
    assert (changed[:, 7:] - whole[:, 7:]).abs().max() > 1e-3


def test_a_limit_holds_in_training_only_and_what_it_drops_is_counted(build: Callable[..., GPTModel]) -> None:
    free, limited = (tiny(experts=experts(PAIRS, capacity_factor=limit)) for limit in (None, 0.5))
    batch = usual_batch()

    def run(config: Config, *, training: bool) -> tuple[Tensor, dict[str, float]]:
        stats = RoutingStats()
        logits = run_model(build(config).train(training), batch, stats=stats)
        return logits.detach(), means_over_layers([stats.read()])

    (whole, none), (same, still), (other, some) = (
        run(free, training=True),
        run(limited, training=False),
        run(limited, training=True),
    )
    assert torch.equal(whole, same) and not torch.equal(whole, other)
    for group in ("text", "image"):
        assert none[f"experts/{group}/dropped_fraction"] == still[f"experts/{group}/dropped_fraction"] == 0.0
        # With one expert for each token, the dropped ones are those without an expert.
        dropped = some[f"experts/{group}/dropped_fraction"]
        assert dropped == pytest.approx(some[f"experts/{group}/unrouted_fraction"]) and dropped > 0.1


def test_biases_stay_fp32(build: Callable[..., GPTModel]) -> None:
    model = build(tiny(experts=experts(PAIRS), dtype="bf16")).bfloat16()
    biases = {name: buffer for name, buffer in model.named_buffers() if "router_bias" in name}
    assert len(biases) == 4 and all(buffer.dtype == torch.float32 for buffer in biases.values())
    assert not set(biases) & dict(model.named_parameters()).keys()
    assert params_of(usual_batch()).loads is None
