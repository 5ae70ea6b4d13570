"""Emulated FP8 trains as bf16 does, and what the stability report is made of."""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch

from mmscale.bench import fp8_stability
from mmscale.bench.fp8_stability import lr_sensitivity
from mmscale.bench.fp8_toy import Toy, toy_config, train_toy
from mmscale.config.precision.schema import PrecisionConfig
from mmscale.config.rules import check
from mmscale.errors import UsageError
from mmscale.runtime import groups
from mmscale.runtime.rank_env import RankEnv


@pytest.fixture
def process_groups() -> Iterator[None]:
    groups.finalize()
    groups.initialize(RankEnv())
    yield
    groups.finalize()


@pytest.mark.long
def test_two_hundred_steps_end_within_two_percent_of_bf16(process_groups: None) -> None:
    """The mean of the last fifty losses, of runs that have learned most of what there is."""
    size: dict[str, Any] = {"hidden": 32, "seq": 32, "steps": 200, "lr": 4e-3}
    ends = {}
    for name in ("high", "delayed", "blockwise"):
        config = toy_config(**size, precision=fp8_stability.FORMATS[name])
        check(config)
        losses = train_toy(config).losses
        ends[name] = statistics.fmean(losses[-50:])
        assert ends[name] < 0.35 * losses[0]
    assert ends["delayed"] == pytest.approx(ends["high"], rel=0.02)
    assert ends["blockwise"] == pytest.approx(ends["high"], rel=0.02)
    assert len(set(ends.values())) == 3, "nothing was rounded"


def test_a_report_of_a_few_steps() -> None:
    groups.finalize()
    result = fp8_stability.run(formats="tensorwise", lrs=(1e-3, 1e-2), seeds=1, steps=10)
    assert list(result["formats"]) == ["high", "tensorwise"]
    high, fp8 = result["formats"].values()
    assert [run["lr"] for run in fp8["runs"]] == [1e-3, 1e-2]
    assert high["worst_ratio"] == high["mean_ratio"] == 1.0
    assert 0.9 < fp8["mean_ratio"] < 1.1 and fp8["mean_ratio"] != 1.0
    for found in (high, fp8):
        assert found["diverged"] == 0 and found["lr_sensitivity"] > 0
        # Up the gradient the loss rises, in the corner of a box of logits it rises most.
        assert found["logit_sharpness"] > 0 and found["weight_sharpness"] > 0
    text = fp8_stability.render(result)
    assert "| bf16 |" in text and "| tensorwise |" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


@pytest.mark.parametrize(
    ("options", "cause"),
    [({"formats": "int4"}, "no format is called int4"), ({"hidden": 40}, "hidden = 40"), ({"steps": 3}, "steps = 3")],
)
def test_refused_options(options: dict[str, Any], cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        fp8_stability.run(**options)


def test_the_corner_of_the_box_is_the_worst_of_it(process_groups: None) -> None:
    """Against a random search, and weights are as they were after a walk through them."""
    toy = train_toy(toy_config(hidden=32, seq=32, steps=10))
    (chunk,), held_out = toy.stepper.chunks, toy.held_out[:1]
    before = [parameter.detach().clone() for parameter in chunk.parameters()]
    rises = [fp8_stability.weight_sharpness(toy.stepper, held_out, radius=radius) for radius in (0.01, 0.1)]
    assert 0 < rises[0] < rises[1]
    assert all(torch.equal(one, other) for one, other in zip(before, chunk.parameters(), strict=True))
    epsilon = 0.05
    found = fp8_stability.logit_sharpness(toy.stepper, held_out, epsilon=epsilon)
    (batch,) = held_out
    with torch.no_grad():
        logits = chunk(
            input_ids=batch.tokens, position_ids=None, attention_mask=None, packed_seq_params=batch.params
        ).float()
    generator, own = torch.Generator().manual_seed(0), batch.loss_mask.bool()

    def loss(values: torch.Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(values[own], batch.labels[own]))

    start = loss(logits)
    for _ in range(50):
        corner = torch.randint(0, 2, logits.shape, generator=generator) * 2.0 - 1.0
        assert 100 * (loss(logits + epsilon * (logits.abs() + 1) * corner) - start) / (1 + start) < found
    label = torch.nn.functional.one_hot(batch.labels.clamp(min=0), logits.shape[-1])
    worst = loss(logits + epsilon * (logits.abs() + 1) * (1.0 - 2.0 * label))
    assert found == pytest.approx(100 * (worst - start) / (1 + start), rel=1e-4)


def test_sensitivity_to_the_learning_rate() -> None:
    """Mean distance to the best learning rate; a run that diverged counts with the loss of its start."""
    runs = [
        {"lr": 1e-3, "loss": 2.0, "first": 5.0, "diverged": False},
        {"lr": 1e-2, "loss": 1.0, "first": 5.0, "diverged": False},
        {"lr": 1e-2, "loss": 1.5, "first": 5.0, "diverged": False},
        {"lr": 1e-1, "loss": math.nan, "first": 5.0, "diverged": True},
    ]
    assert lr_sensitivity(runs) == pytest.approx((2.0 + 1.25 + 5.0) / 3 - 1.25)


@pytest.mark.parametrize(
    ("losses", "gone"),
    [
        ([5.0, 3.0, 2.0, 1.9], False),
        ([5.0, 3.0, 2.0, 2.3], False),
        ([5.0, 2.0, 2.0, 4.0], True),
        ([5.0, math.nan], True),
    ],
)
def test_what_counts_as_diverged(losses: list[float], gone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Toy, "held_out_loss", property(lambda self: self.losses[-1]))
    assert fp8_stability.has_diverged(Toy(toy_config(), None, losses, [])) is gone  # type: ignore[arg-type]


def test_every_recipe_is_compared_unless_others_are_named() -> None:
    """`mmscale bench fp8-stability` without options: a new recipe is compared from the day on which it is added."""
    recipes = set(get_args(PrecisionConfig.model_fields["fp8"].annotation)) - {"off"}
    compared = inspect.signature(fp8_stability.run).parameters["formats"].default
    assert {fp8_stability.FORMATS[name]["fp8"] for name in compared} == recipes
