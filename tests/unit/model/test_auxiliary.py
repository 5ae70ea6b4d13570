"""Auxiliary routers and thresholds: causal models against loops, what routers learn from, calibration."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from torch import Tensor
from torch.nn import functional as F

from mmscale.config import Config, ExpertsConfig, ModelConfig
from mmscale.model.auxiliary import AuxiliaryRouter, RouterLearning, ratios, routers_of
from mmscale.model.layer import DepthLayer
from mmscale.model.mixed_modal import MixedModalParams
from mmscale.model.ranking import RANKINGS
from mmscale.plan import count_parameters
from mmscale.tables.routings import Routing
from tests.unit.model.comparison import TOLERANCE, params_of, relative, run_model
from tests.unit.model.reference import (
    SHARE,
    Batch,
    Facts,
    Reference,
    batch_of,
    depth,
    moma_experts,
    random_documents,
    tiny,
    usual_batch,
)
from tests.unit.model.reference_parts import rank

CAUSAL = [routing for routing in Routing if not routing.leaks]


def with_routers(**settings: Any) -> Config:
    """A tiny configuration whose model holds auxiliary routers and thresholds."""
    made = tiny(**settings)
    experts = made.model.experts.model_copy(update={"threshold_decay": 0.9})
    model = {**made.model.model_dump(), "experts": experts, "auxiliary": {"mode": "stage", "width": 6}}
    return made.model_copy(update={"model": ModelConfig.model_validate(model)})


MODELS = {
    "moma": with_routers(),
    "moma_shared_post_per_expert": with_routers(norm="post_per_expert", experts=moma_experts(shared=1)),
    "moe": with_routers(kind="moe", norm="post"),
    "competitive": with_routers(experts=moma_experts(choice="competitive"), depth=depth(), num_layers=3),
    "softmax": with_routers(kind="moe", experts=ExpertsConfig(counts={"mixed": 4}, share=SHARE, choice="softmax")),
    "moma_depth": with_routers(depth=depth(), num_layers=3),
    "dense_depth": with_routers(kind="dense", depth=depth()),
}


def uneven_thresholds(model: GPTModel) -> None:
    """Thresholds that differ between experts and from what they start with."""
    generator = torch.Generator().manual_seed(5)
    for name, buffer in model.named_buffers():
        if name.endswith(".threshold"):
            buffer.uniform_(0.4, 0.6, generator=generator)
        elif "threshold." in name:
            buffer.add_(torch.rand(buffer.shape, generator=generator) * 0.4 - 0.2)


class CausalReference(Reference):
    """The model's loops, with choices made token by token."""

    def __init__(self, config: Config, model: GPTModel, routing: Routing) -> None:
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        super().__init__(config, {name: tensor.detach().double() for name, tensor in tensors.items()})
        self.routing = routing

    def _scores(self, prefix: str, token: Tensor) -> Tensor:
        inner = self.weights[f"{prefix}hidden"] @ token
        return torch.sigmoid(self.weights[f"{prefix}out"] @ (inner * torch.sigmoid(inner)))

    def gates(
        self, prefix: str, group: str, hidden: list[Tensor], facts: list[Facts]
    ) -> dict[tuple[int, int, int], Tensor]:
        names = self.config.vocab.names
        wanted = {names.index(group)} if self.model.kind == "moma" else set(range(len(names)))
        router, auxiliary = self.weights[f"{prefix}mlp.router.{group}"], f"{prefix}mlp.auxiliary.{group}."
        chosen = {}
        for b, (x, own) in enumerate(zip(hidden, facts, strict=True)):
            for i, token in enumerate(x):
                if own.modality[i] not in wanted:
                    continue
                logits, scores = router @ token, self._scores(auxiliary, token)
                ranked = self._cut_by(logits)
                for expert in range(len(logits)):
                    if {
                        Routing.CAUSAL: scores[expert] > self.weights[f"{auxiliary}threshold"][expert],
                        Routing.TOP1: int(scores.argmax()) == expert,
                        Routing.THRESHOLD: ranked[expert] > self.weights[f"{prefix}mlp.threshold.{group}"][expert],
                    }[self.routing]:
                        chosen[expert, b, i] = torch.sigmoid(logits[expert])
        return chosen

    def _cut_by(self, logits: Tensor) -> list[float]:
        """What a token's logits are compared with cut-offs as: the logarithm where tokens are ranked by a softmax."""
        choice = self.model.experts.choice
        if choice == "softmax" and len(logits) > 1:
            return [math.log(value) for value in rank(logits.tolist(), choice)]
        return rank(logits.tolist(), choice) if choice == "competitive" and len(logits) > 1 else logits.tolist()

    def layer(self, number: int, hidden: list[Tensor], facts: list[Facts]) -> list[Tensor]:
        if self.model.depth is None or number % self.model.depth.every != 0:
            return self.inner_layer(number, hidden, facts)
        prefix = f"decoder.layers.{number}."
        result = []
        for x, own in zip(hidden, facts, strict=True):
            gates = [self.weights[f"{prefix}depth_router"] @ token for token in x]
            rows = []
            for i, token in enumerate(x):
                score = self._scores(f"{prefix}depth_auxiliary.", token)
                by_router = score > self.weights[f"{prefix}depth_auxiliary.threshold"]
                by_average = gates[i] > self.weights[f"{prefix}depth_threshold.logit"]
                if own.modality[i] >= 0 and bool(by_average if self.routing is Routing.THRESHOLD else by_router):
                    rows.append(i)
            tokens = list(x)
            if rows:
                (processed,) = self.inner_layer(number, [x[rows]], [own.take(rows)])
                for place, i in enumerate(rows):
                    tokens[i] = x[i] + torch.sigmoid(gates[i]) * (processed[place] - x[i])
            result.append(torch.stack(tokens))
        return result


@pytest.mark.parametrize("routing", CAUSAL)
@pytest.mark.parametrize("name", MODELS)
def test_causal_model_is_the_reference(name: str, routing: Routing, build: Callable[..., GPTModel]) -> None:
    model = build(MODELS[name]).eval()
    uneven_thresholds(model)
    batch = usual_batch()
    with torch.no_grad():
        found = run_model(model, batch, routing=routing)
    assert relative(found, CausalReference(MODELS[name], model, routing).logits(batch)) < TOLERANCE


def _changed_future(batch: Batch, *, first: int) -> Batch:
    """The same beginnings with other tokens, of other modalities too, from a position on."""
    ids, modality = batch.ids.clone(), batch.modality.clone()
    length = ids.shape[1]
    others = torch.where(torch.arange(length - first) % 2 == 0, 25, 7)  # an image code, a text id
    ids[:, first:] = others
    modality[:, first:] = (others >= 20).to(modality.dtype)
    return Batch(ids, modality, batch.position, batch.document)


@pytest.mark.parametrize("name", MODELS)
def test_only_batch_routing_sees_the_future(name: str, build: Callable[..., GPTModel]) -> None:
    model = build(MODELS[name]).eval()
    uneven_thresholds(model)
    batch = batch_of([random_documents((12,), seed=seed, image=0.5) for seed in (1, 2)], length=12)
    for routing in Routing:
        moved = 0.0
        for first in range(1, 12):
            with torch.no_grad():
                one = run_model(model, batch, routing=routing)[:, :first]
                other = run_model(model, _changed_future(batch, first=first), routing=routing)[:, :first]
            moved = max(moved, relative(one, other))
        assert moved > 1e-2 if routing.leaks else moved < 1e-6, (routing, moved)


@pytest.mark.parametrize("routing", CAUSAL)
def test_a_document_scores_the_same_alone_packed_and_padded(routing: Routing, build: Callable[..., GPTModel]) -> None:
    model = build(MODELS["moma_depth"]).eval()
    uneven_thresholds(model)
    documents = [random_documents((size,), seed=size, image=0.5)[0] for size in (5, 4, 3, 6)]
    packed = batch_of([documents[:3], [documents[3]]], length=12)
    with torch.no_grad():
        together = run_model(model, packed, routing=routing)
        for (row, start), document in zip([(0, 0), (0, 5), (0, 9), (1, 0)], documents, strict=True):
            alone = run_model(model, batch_of([[document]], length=len(document)), routing=routing)[0]
            assert relative(together[row, start : start + len(document)], alone) < 1e-6


def _taught(model: GPTModel, batch: Batch, learning: RouterLearning) -> MixedModalParams:
    params = params_of(batch)
    params.learning = learning
    model(batch.ids, batch.position, None, packed_seq_params=params)
    return params


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(
    ("kind", "experts"),
    [
        ("moma", None),
        ("moe", None),
        *(("moma", moma_experts(choice=choice)) for choice in list(RANKINGS)[1:]),
        ("moma", moma_experts(capacity="actual")),
        ("moma", moma_experts(capacity="actual", choice="competitive", capacity_factor=1.4)),
    ],
    ids=["moma", "moe", *list(RANKINGS)[1:], "actual", "actual competitive"],
)
def test_routers_learn_the_true_choice_and_nothing_else_does(
    kind: str, experts: ExpertsConfig | None, recompute: str, build: Callable[..., GPTModel]
) -> None:
    """Loss, gradient and figures of every router from plain tensors; the main model's gradients are untouched."""
    config = with_routers(kind=kind, depth=depth(), recompute=recompute, experts=experts)
    model, batch = build(config).train(), usual_batch()
    learning = RouterLearning(gradients=True)
    params = params_of(batch)
    params.learning = learning
    inputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, args[0].clone()))
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryRouter)
    ]
    model(batch.ids, batch.position, None, packed_seq_params=params).square().sum().backward()
    for hook in hooks:
        hook.remove()
    main = {n: p.grad.clone() for n, p in model.named_parameters() if "auxiliary" not in n and p.grad is not None}
    own = {n: p.grad.clone() for n, p in model.named_parameters() if "auxiliary" in n and p.grad is not None}
    model.zero_grad(set_to_none=True)
    run_model(model, batch).square().sum().backward()
    plain = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert main.keys() == plain.keys() and all(torch.equal(main[name], plain[name]) for name in main)

    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryRouter):
            layer = int(name.split(".")[2])
            parent = model.decoder.layers[layer]
            assert isinstance(inputs[name], Tensor)
            hidden = module.hidden.detach().clone().requires_grad_()
            out = module.out.detach().clone().requires_grad_()
            logits = F.silu(inputs[name].detach() @ hidden.t()) @ out.t()
            kind_of = "depth" if name.endswith("depth_auxiliary") else f"experts/{name.rpartition('.')[2]}"
            choice, member = _true_choice(parent, kind_of, inputs[name].detach(), params, batch)
            loss = F.binary_cross_entropy_with_logits(logits, choice.float(), reduction="none")
            loss = (loss * member.unsqueeze(-1)).sum()
            loss.backward()
            record = learning.records[layer + 1, kind_of]
            assert float(record.loss) == pytest.approx(float(loss), rel=1e-5)
            assert int(record.decisions) == int(member.sum()) * logits.shape[-1]
            assert hidden.grad is not None and out.grad is not None
            assert relative(own[f"{name}.hidden"], hidden.grad) < 1e-5
            assert relative(own[f"{name}.out"], out.grad) < 1e-5
            right = (((logits > 0) == choice) & member.unsqueeze(-1)).sum() / int(record.decisions)
            figures = ratios(torch.stack(tuple(record.figures.values())).sum(dim=0))
            assert figures["accuracy"] == pytest.approx(float(right))


def _true_choice(
    layer: torch.nn.Module, kind: str, hidden: Tensor, params: MixedModalParams, batch: Batch
) -> tuple[Tensor, Tensor]:
    """[S, B, E] choices and [S, B] members, from logits and sorting by hand."""
    modality = batch.modality.t()
    if kind == "depth":
        assert isinstance(layer, DepthLayer)
        logits = (hidden @ layer.depth_router.detach()).masked_fill(modality < 0, -1e9)
        choice = torch.zeros(*logits.shape, 1, dtype=torch.bool)
        for b in range(logits.shape[1]):
            choice[logits[:, b].topk(layer.depth.keep).indices, b] = True
        return choice, modality >= 0
    if isinstance(layer, DepthLayer):
        # What the inner layer saw: the chosen tokens, in order.
        rows = torch.tensor([[i for i in range(12) if i in set(c)] for c in _kept(layer, params, batch)]).t()
        modality = modality.gather(0, rows)
    mlp: Any = layer.mlp
    name = kind.split("/")[1]
    (group,) = (g for g in mlp.settings.groups if g.name == name)
    member = torch.isin(modality, torch.tensor(group.modalities, dtype=modality.dtype))
    logits = hidden @ getattr(mlp.router, name).detach().t()
    ranked = [[rank(token.tolist(), mlp.settings.choice) for token in row] for row in logits]
    length = logits.shape[0]
    choice = torch.zeros(logits.shape, dtype=torch.bool)
    for b in range(logits.shape[1]):
        own = [i for i in range(length) if member[i, b]]
        among = len(own) if mlp.settings.actual else length * group.share
        capacity = max(1, math.ceil(mlp.settings.capacity_factor * among / group.experts - 1e-9))
        for e in range(group.experts):
            for i in sorted(own, key=lambda i: -ranked[i][b][e])[:capacity]:
                choice[i, b, e] = True
    return choice, member


_DEPTH_INPUT: dict[int, Tensor] = {}


def _kept(layer: DepthLayer, params: MixedModalParams, batch: Batch) -> list[list[int]]:
    hidden = _DEPTH_INPUT[id(layer)]
    logits = (hidden @ layer.depth_router.detach()).masked_fill(batch.modality.t() < 0, -1e9)
    return [logits[:, b].topk(layer.depth.keep).indices.tolist() for b in range(logits.shape[1])]


@pytest.fixture(autouse=True)
def _depth_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remember what depth layers were given."""
    forward = DepthLayer.forward

    def remembering(self: DepthLayer, hidden_states: Tensor, **facts: Any) -> Any:
        _DEPTH_INPUT.setdefault(id(self), hidden_states.detach().clone())
        return forward(self, hidden_states, **facts)

    _DEPTH_INPUT.clear()
    monkeypatch.setattr(DepthLayer, "forward", remembering)


def test_routers_are_taught_without_noise(build: Callable[..., GPTModel]) -> None:
    """With Gumbel noise in training, the choice to learn is the one without it."""
    config = with_routers(experts=moma_experts(noise="gumbel"))
    model, batch = build(config), usual_batch()
    noisy, still = RouterLearning(gradients=False), RouterLearning(gradients=False)
    hidden = torch.randn(12, batch.ids.shape[0], 16, generator=torch.Generator().manual_seed(2))
    for mode, learning in ((True, noisy), (False, still)):
        params = params_of(batch)
        params.learning = learning
        model.train(mode)
        # the feed-forward slot by itself: noise of its own choice would change nothing that it learns from
        model.decoder.layers[0].mlp(hidden, padding_mask=params)
    assert noisy.records.keys() == still.records.keys()
    for key, record in noisy.records.items():
        assert torch.equal(record.loss, still.records[key].loss), key


def test_routers_change_no_other_weight(build: Callable[..., GPTModel]) -> None:
    with_them = build(with_routers(depth=depth()), randomised=False)
    without = build(tiny(depth=depth()), randomised=False)
    others = dict(with_them.named_parameters())
    assert set(others) - set(dict(without.named_parameters())) == {n for n in others if "auxiliary" in n}
    for name, parameter in without.named_parameters():
        assert torch.equal(parameter, others[name]), name
    assert all(float(p.abs().sum()) > 0 for p in with_them.parameters())
    assert {float(b.mean()) for n, b in with_them.named_buffers() if n.endswith(".threshold")} == {0.5}


@pytest.mark.parametrize("name", MODELS)
def test_the_plan_counts_them(name: str, build: Callable[..., GPTModel]) -> None:
    model = build(MODELS[name], randomised=False)
    counted = count_parameters(MODELS[name])
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.as_dict()["auxiliary_routers"] == sum(p.numel() for r in routers_of(model) for p in r.parameters())


def test_thresholds_stay_fp32_in_a_bf16_model(build: Callable[..., GPTModel]) -> None:
    model = build(with_routers(dtype="bf16", depth=depth()), randomised=False)
    for name, buffer in model.named_buffers():
        if "threshold" in name:
            buffer.fill_(0.123456789)
    for name, buffer in Float16Module(model.config, model).named_buffers():
        if "threshold" in name:
            assert buffer.dtype is torch.float32 and float(buffer[0]) == pytest.approx(0.123456789, abs=1e-8), name
