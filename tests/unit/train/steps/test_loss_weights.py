# mmscale/train/steps/loss_weights.py against a loop over documents, and a run without weights.
"""Loss-based weights of documents: values, averages, portions of a batch, steps that are not applied."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from mmscale.config import Config
from mmscale.config.train.schema import LossWeightsConfig
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.steps.batch import Batch
from mmscale.train.steps.loss_weights import BINS, FUNCTIONS, WIDTH, LossWeights, quantile
from tests.distributed.layouts import config as tiny
from tests.support import distributed
from tests.unit.train.steps.test_step import batches, changed, parts, rows, weights

SETTINGS = {"temperature": 0.5, "largest": 1.5, "decay": 0.75, "warmup": 3}


def documents_of(batch: Batch, ce: np.ndarray, modalities: int) -> list[tuple[int, list[tuple[int, int]], float]]:
    """Modality, places and mean loss of the trained labels of every document, one token after another."""
    found: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    ids = batch.params.document_ids.t()
    for row in range(len(batch.tokens)):
        for place in range(batch.tokens.shape[1]):
            if batch.loss_mask[row, place]:
                key = (int(batch.label_modality[row, place]), row, int(ids[row, place]))
                found.setdefault(key, []).append((row, place))
    assert all(key[0] < modalities for key in found)
    return [(key[0], places, float(np.mean([ce[at] for at in places]))) for key, places in found.items()]


def slow_function(kind: str, h: float) -> float:
    return {"linupper": min(h + 1, 1.0), "quadratic": 1 - h**2, "extremes": abs(h)}[kind]


def slow_quantile(losses: list[float], share: float) -> float:
    """Of a density in which each loss is divided between the two nearest bins by its distance from their centres."""
    mass = [0.0] * BINS
    for loss in losses:
        at = loss / WIDTH - 0.5
        lower = min(max(math.floor(at), 0), BINS - 2)
        upper = min(max(at - lower, 0.0), 1.0)
        mass[lower] += 1 - upper
        mass[lower + 1] += upper
    left = share * len(losses)
    for number, one in enumerate(mass):
        if one >= left:
            return (number + left / one) * WIDTH
        left -= one
    raise AssertionError


@distributed(world_size=1)
def test_weights_and_averages_equal_a_loop(ranks: RankEnv) -> None:
    process_groups.start(ranks)
    groups, made = process_groups.initialize_layout(), tiny("moma")
    names, rng = made.vocab.names, np.random.default_rng(1)
    for kind in FUNCTIONS:
        weigher = LossWeights(LossWeightsConfig(kind=kind, **SETTINGS), names, groups)
        averages = [{"low": 0.0, "high": 0.0, "mean": 0.0, "n": 0} for _ in names]
        for step in range(6):
            given = batches(made, range(4 * step, 4 * step + 4))
            given[1].loss_mask[0, 9:] = 0.0
            given[2].loss_mask[given[2].label_modality == 1] = 0.0
            weigher.begin(given)
            seen: list[list[tuple[float, int, float]]] = [[] for _ in names]
            for batch in given:
                ce = torch.from_numpy(rng.gamma(4.0, 1.0, batch.tokens.shape).astype(np.float32))
                wanted = np.zeros(batch.tokens.shape)
                for modality, places, loss in documents_of(batch, ce.double().numpy(), len(names)):
                    known = averages[modality]
                    h = (2 * loss - known["high"] - known["low"]) / max(known["high"] - known["low"], 1e-6)
                    raw = math.exp((slow_function(kind, min(max(h, -1.0), 1.0)) - 1) / 0.5)
                    weight = min(raw / known["mean"], 1.5) if known["n"] >= 3 else 1.0
                    for at in places:
                        wanted[at] = weight
                    seen[modality].append((loss, len(places), raw))
                np.testing.assert_allclose(weigher.weights(batch, ce).numpy(), wanted, rtol=1e-4)
                assert wanted.max() <= 1.5
            weigher.finish(lr=0.0)
            for modality, own in enumerate(seen):
                known = averages[modality]
                kept = min(0.75, known["n"] / (known["n"] + 1))
                for name, share in (("low", 0.01), ("high", 0.99)):
                    new = slow_quantile([loss for loss, _, _ in own], share)
                    known[name] = kept * known[name] + (1 - kept) * new
                if known["n"]:
                    kept = min(0.75, (known["n"] - 1) / known["n"])
                    mean = sum(raw * length for _, length, raw in own) / sum(length for _, length, _ in own)
                    known["mean"] = kept * known["mean"] + (1 - kept) * mean
                known["n"] += 1
            wanted_state = [[known[key] for key in ("low", "high", "mean", "n")] for known in averages]
            np.testing.assert_allclose(weigher.plain(), wanted_state, rtol=1e-5)
        figures = weigher.figures()
        assert 0 < figures["loss_weights/effective_share/text"] < 1
        assert {"low", "high", "mean", "effective_share", "length_correlation"} == {
            name.split("/")[1] for name in figures
        }
    process_groups.finalize()


def test_quantiles_are_those_of_the_losses() -> None:
    losses = np.random.default_rng(3).gamma(4.0, 1.0, 5000).clip(max=15.9)
    at = losses / WIDTH - 0.5
    lower = np.floor(at).clip(0, BINS - 2).astype(int)
    histogram = np.bincount(lower, 1 - (at - lower), BINS) + np.bincount(lower + 1, at - lower, BINS)
    for share in (0.05, 0.5, 0.95):  # where the losses lie close together
        found = float(quantile(torch.from_numpy(2.0**16 * histogram)[None], share))
        assert found == pytest.approx(np.quantile(losses, share), abs=2 * WIDTH)


def _run(made: Config, *, steps: int, portions: bool = False, refused: bool = False) -> tuple[Any, ...]:
    """Gradient norms, weights of the model and the averages after some steps."""
    built = parts(changed(made, "train", micro_batch_size=1) if portions else made)
    norms = []
    for step in range(steps):
        given = batches(made, range(2 * step, 2 * step + 2))
        if portions:
            given = [rows(batch, row, row + 1) for batch in given for row in range(2)]
        if refused:
            built.stepper.compute(batches(made, range(50, 52)))  # never applied
        norms.append(built.stepper.train(given, lr=1e-3).grad_norm)
    found = norms, weights(built), built.stepper.loss_weights and built.stepper.loss_weights.plain()
    process_groups.destroy_layout()
    return found


@distributed(world_size=1)
def test_before_they_count_nothing_changes(ranks: RankEnv) -> None:
    """Off and during the warm-up: the same bits. Then they change the gradient, but not the reported loss."""
    process_groups.start(ranks)
    plain = _run(tiny("moma"), steps=4)
    warm = _run(tiny("moma", loss_weights={"warmup": 4}), steps=4)
    assert warm[0] == plain[0] and torch.equal(warm[1], plain[1]) and plain[2] is None
    counted = _run(tiny("moma", loss_weights={"warmup": 2}), steps=4)
    assert counted[0][:2] == plain[0][:2] and counted[0][2] != plain[0][2]
    process_groups.finalize()


@distributed(world_size=1)
def test_portions_of_a_batch_and_refused_steps_change_nothing(ranks: RankEnv) -> None:
    process_groups.start(ranks)
    made = tiny("moma", loss_weights={"warmup": 2, "temperature": 0.4})
    whole, again = _run(made, steps=5), _run(made, steps=5, refused=True)
    assert again[0] == whole[0] and torch.equal(again[1], whole[1]) and again[2] == whole[2]
    norms, _, averages = _run(made, steps=5, portions=True)
    assert norms == pytest.approx(whole[0], rel=2e-6)
    np.testing.assert_allclose(averages, whole[2], rtol=2e-6)
    process_groups.finalize()
