"""Figures of routing: counts of whole models and of layers, counted again one by one."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from mmscale.config import Config, ExpertsConfig
from mmscale.model.mixed_modal import RoutingStats, means_over_layers
from mmscale.train.log.layers_log import fractions
from tests.unit.model.comparison import (
    facts_of,
    params_of,
    run_model,
    weights_of,
)
from tests.unit.model.reference import (
    SHARE,
    Batch,
    Reference,
    batch_of,
    depth,
    moma_experts,
    random_documents,
    tiny,
    usual_batch,
)
from tests.unit.model.test_moma import UNEVEN

# --- figures --------------------------------------------------------------------------------------------------------


def expected_figures(config: Config, model: GPTModel, hidden: Tensor, batch: Batch, group: str) -> tuple[float, ...]:
    """Unrouted share, and coefficients of variation of experts' tokens and of their gates, counted one by one."""
    facts = facts_of(batch)
    chosen = Reference(config, weights_of(model)).gates("decoder.layers.0.", group, list(hidden.unbind(1)), facts)
    modality = config.vocab.names.index(group)
    own = [(b, i) for b, f in enumerate(facts) for i, m in enumerate(f.modality) if m == modality]
    routed = {(b, i) for _, b, i in chosen}
    experts = range(config.model.experts.counts[group])
    filled = [float(sum(e == expert for e, _, _ in chosen)) for expert in experts]
    mass = [float(sum(gate for (e, _, _), gate in chosen.items() if e == expert)) for expert in experts]
    unrouted = sum(place not in routed for place in own) / len(own) if own else 0.0
    return unrouted, _variation(filled), _variation(mass)


def _variation(values: list[float]) -> float:
    """Standard deviation over mean."""
    mean = sum(values) / len(values)
    return (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5 / mean if mean else 0.0


@pytest.mark.parametrize("scope", ["sequence", "micro_batch"])
@pytest.mark.parametrize("image", [0.0, 0.3])
def test_routing_figures_are_counts(scope: str, image: float, build: Callable[..., GPTModel]) -> None:
    config = tiny(experts=moma_experts(scope=scope, share=UNEVEN, capacity_factor=0.4))
    model = build(config)
    batch = batch_of(
        [random_documents((12,), seed=3, image=image), random_documents((9,), seed=4, image=image)], length=12
    )
    hidden = torch.randn(12, 2, 16, generator=torch.Generator().manual_seed(9))
    stats = RoutingStats()
    model.decoder.layers[0].mlp(hidden, padding_mask=params_of(batch, stats=stats))
    assert {layer for layer, _ in stats.read()} == {1}
    got = means_over_layers([stats.read()])
    for group in ("text", "image"):
        if group == "image" and not image:
            assert not [name for name in got if group in name]
            continue
        unrouted, variation, mass = expected_figures(config, model, hidden, batch, group)
        assert got[f"experts/{group}/unrouted_fraction"] == pytest.approx(unrouted, abs=1e-6)
        assert got[f"experts/{group}/tokens_per_expert_cv"] == pytest.approx(variation, abs=1e-6)
        assert got[f"experts/{group}/gate_mass_cv"] == pytest.approx(mass, abs=1e-6)
    assert 0.0 < got["experts/text/unrouted_fraction"] < 1.0


@pytest.mark.parametrize("kind", ["moma", "moe"])
def test_counts_of_a_layer_are_counted_one_by_one(kind: str, build: Callable[..., GPTModel]) -> None:
    """Load, gates, co-selection and tokens nobody took by modality, also where one group takes both."""
    experts = moma_experts(share=UNEVEN, capacity_factor=0.7)
    if kind == "moe":
        experts = ExpertsConfig(counts={"mixed": 3}, share=SHARE, capacity_factor=0.7)
    config = tiny(kind, experts=experts)
    model, batch, stats = build(config), usual_batch(), RoutingStats(modalities=2)
    hidden = torch.randn(12, 2, 16, generator=torch.Generator().manual_seed(9))
    model.decoder.layers[0].mlp(hidden, padding_mask=params_of(batch, stats=stats))
    got = fractions({key: value.numpy() for key, value in stats.counts.items()}, config.vocab.names)["0"]["experts"]
    facts, reference = facts_of(batch), Reference(config, weights_of(model))
    for group, number in experts.counts.items():
        gates = reference.gates("decoder.layers.0.", group, list(hidden.unbind(1)), facts)
        for index, modality in enumerate(config.vocab.names):
            own = {(b, i) for b, f in enumerate(facts) for i, m in enumerate(f.modality) if m == index}
            taken = [{(b, i) for e, b, i in gates if e == expert and (b, i) in own} for expert in range(number)]
            if group not in (modality, "mixed"):
                assert modality not in got[group]
                continue
            found = got[group][modality]
            assert found["unrouted"] == pytest.approx(1 - len(set().union(*taken)) / len(own), abs=1e-5)
            assert found["load"] == pytest.approx([len(t) / len(own) for t in taken], abs=1e-5)
            means = [sum(float(gates[e, b, i]) for b, i in t) / max(1, len(t)) for e, t in enumerate(taken)]
            assert found["gate"] == pytest.approx(means, abs=1e-4)
            assert ("coselection" in found) == (number > 1)
            for first, row in zip(taken, found.get("coselection", []), strict=number > 1):
                assert row == pytest.approx([len(first & t) / max(1, len(first)) for t in taken], abs=1e-5)


def test_output_norm_of_every_layer_by_modality(build: Callable[..., GPTModel]) -> None:
    config = tiny(depth=depth())
    model, batch, stats = build(config), usual_batch(), RoutingStats(modalities=2)
    outputs: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _m, _i, out: outputs.append(out[0])) for layer in model.decoder.layers]
    run_model(model, batch, stats=stats)
    for hook in hooks:
        hook.remove()
    got = fractions({key: value.numpy() for key, value in stats.counts.items()}, config.vocab.names)
    for layer, output in enumerate(outputs):
        for index, modality in enumerate(config.vocab.names):
            places = [(i, b) for b, f in enumerate(facts_of(batch)) for i, m in enumerate(f.modality) if m == index]
            mean = sum(float(output[i, b].norm()) for i, b in places) / len(places)
            assert got[str(layer)]["output_norm"][modality] == pytest.approx(mean, rel=1e-4)
    means = means_over_layers([stats.read()])  # of the only layer with depth
    assert set(got["0"]["depth"]) == {"text", "image"} and "depth" not in got["1"]
    for modality, share in got["0"]["depth"].items():
        assert share == pytest.approx(means[f"depth/selected_fraction/{modality}"], rel=1e-4)


def test_figures_of_layers_are_averaged_and_detached(build: Callable[..., GPTModel]) -> None:
    stats = RoutingStats()
    run_model(build(tiny()), usual_batch(), stats=stats)
    assert {layer for layer, _ in stats.read()} == {1, 2}
    assert not any(found.total.requires_grad for found in stats._figures.values())
    for name, mean in means_over_layers([stats.read()]).items():
        own = {layer: value / weight for (layer, key), (value, weight) in stats.read().items() if key == name}
        assert mean == pytest.approx(sum(own.values()) / len(own))
        assert list(own) == ([2] if name == "output_norm" else [1, 2])


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("in_flight", [0, 1, 2], ids=["", "recomputed", "recomputed in a pipeline"])
def test_figures_of_a_step_weigh_tokens(ranks: int, in_flight: int, build: Callable[..., GPTModel]) -> None:
    """Micro-batches, on one rank or two, of which one has no image: it does not change the images' share."""
    config = tiny(experts=moma_experts(share=UNEVEN, capacity_factor=0.4), depth=depth())
    model = build(config)
    parts = [[random_documents((12,), seed=3, image=image)] for image in (0.6, 0.0, 0.3)]

    def figures(numbers: Iterable[int]) -> RoutingStats:
        stats = RoutingStats(modalities=2)
        for number in reported(list(numbers), in_flight=in_flight):
            run_model(model, batch_of(parts[number], length=12), stats=stats, noise_key=number)
        return stats

    alone = {number: means_over_layers([figures([number]).read()]) for number in range(3)}
    of_ranks = [figures(range(rank, 3, ranks)) for rank in range(ranks)]
    got = means_over_layers([stats.read() for stats in of_ranks])
    for name in ("experts/{}/unrouted_fraction", "depth/selected_fraction/{}"):
        assert name.format("image") not in alone[1] and name.format("text") in alone[1]
    tokens = {n: [facts.modality.count(1) for facts in facts_of(batch_of(parts[n], length=12))] for n in range(3)}
    shares = [(alone[n]["depth/selected_fraction/image"], sum(tokens[n])) for n in (0, 2)]
    expected = sum(share * number for share, number in shares) / sum(number for _, number in shares)
    assert got["depth/selected_fraction/image"] == pytest.approx(expected)
    assert got["output_norm"] == pytest.approx(sum(alone[n]["output_norm"] for n in range(3)) / 3)
    counts = {key: sum(stats.counts[key] for stats in of_ranks) for key in of_ranks[0].counts}
    whole = fractions({key: value.numpy() for key, value in counts.items()}, config.vocab.names)
    missed = [layer["experts"]["image"]["image"]["unrouted"] for layer in whole.values()]
    assert got["experts/image/unrouted_fraction"] == pytest.approx(sum(missed) / len(missed), rel=1e-4)


def reported(numbers: list[int], *, in_flight: int) -> Iterator[int]:
    """The order in which layers see micro-batches: each again `in_flight` forward passes later; 0: no recompute."""
    for place in range(len(numbers) + in_flight):
        if place < len(numbers):
            yield numbers[place]
        if 0 < in_flight <= place + 1 and place + 1 - in_flight < len(numbers):
            yield numbers[place + 1 - in_flight]


def test_memory_of_figures_does_not_grow_with_micro_batches() -> None:
    def size(micro_batches: int) -> int:
        stats = RoutingStats(modalities=2)
        for number in reported(list(range(7, 7 + micro_batches)), in_flight=4):
            stats.add(1, "figure", torch.tensor(0.5), micro_batch=number, weight=torch.tensor(3))
            stats.count(1, "experts/text/0", torch.ones(1000), micro_batch=number)
        assert stats.read() == {(1, "figure"): (1.5 * micro_batches, 3.0 * micro_batches)}
        assert torch.equal(stats.counts[1, "experts/text/0"], torch.full((1000,), float(micro_batches)).double())
        return len(pickle.dumps(stats))

    assert size(300) <= size(8) + 64


def test_figures_change_no_result(build: Callable[..., GPTModel]) -> None:
    model, batch = build(tiny(depth=depth())), usual_batch()
    plain = run_model(model, batch)
    for modalities in (0, 2):
        assert torch.equal(plain, run_model(model, batch, stats=RoutingStats(modalities=modalities)))
