"""Checkpoints are compared tensor by tensor, each relative to its own norm."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmscale.checkpoint.difference import FLOOR, differences, largest
from mmscale.checkpoint.tensors import TensorEntry

MOMENT = "optimizer.state.exp_avg."
AGREEING = 1e-3


class Held:
    """Tensors in memory."""

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        """All names."""
        return list(self.tensors)

    def entry(self, name: str) -> TensorEntry:
        """Shape and type."""
        return TensorEntry(name, tuple(self.tensors[name].shape), self.tensors[name].dtype)

    def read(self, name: str) -> Tensor:
        """The tensor."""
        return self.tensors[name]


def _apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    sources: list[Any] = [Held(**one), Held(**other)]
    return {found.name: found.value for found in differences(*sources, within=AGREEING)}


def test_a_difference_is_relative_to_the_tensor() -> None:
    one = {f"{MOMENT}a": torch.ones(4), f"{MOMENT}b": torch.full((4,), 1e-3), "w": torch.ones(2)}
    other = {f"{MOMENT}a": torch.ones(4), f"{MOMENT}b": torch.full((4,), 2e-3), "w": torch.full((2,), 1.5)}
    found = _apart(one, other)
    assert found[f"{MOMENT}a"] == 0.0
    assert math.isclose(found[f"{MOMENT}b"], 1.0, rel_tol=1e-6)
    assert list(found) == [f"{MOMENT}b", "w", f"{MOMENT}a"]  # the worst first
    sources: list[Any] = [Held(**one), Held(**other)]
    assert largest(differences(*sources, within=AGREEING)).is_gradient


def test_a_tensor_of_rounding_errors_is_measured_against_its_kind() -> None:
    one = {f"{MOMENT}a": torch.ones(1), f"{MOMENT}b": torch.tensor([1e-9])}
    other = {f"{MOMENT}a": torch.ones(1), f"{MOMENT}b": torch.tensor([-1e-9])}
    assert math.isclose(_apart(one, other)[f"{MOMENT}b"], 2e-9 / FLOOR, rel_tol=1e-5)
    # Weights are large, but they are another kind.
    assert math.isclose(_apart(one | {"w": torch.full((1,), 1e9)}, other | {"w": torch.full((1,), 1e9)})[f"{MOMENT}b"],
                        2e-9 / FLOOR, rel_tol=1e-5)  # fmt: skip


def _first_step(gradient: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """A weight after Adam's first step, with its moment."""
    updated = weight - 1e-3 * gradient / (gradient.abs() + 1e-8)
    return {"w": updated, "optimizer.state.param.w": updated.double(), f"{MOMENT}w": gradient}


def test_elements_whose_gradient_is_rounding_say_nothing_about_a_weight() -> None:
    """A bias that starts at zero consists of its first update, in which a rounding error is as large as a gradient."""
    exact = torch.linspace(1.0, 2.0, 100)
    one, other = exact.clone(), exact.clone()
    one[:10], other[:10] = 1e-7, -1e-7  # the sum of terms that cancel, of the size of the others
    found = _apart(_first_step(one, torch.zeros(100)), _first_step(other, torch.zeros(100)))
    assert found[f"{MOMENT}w"] < 1e-6  # the gradients agree,
    assert found["w"] < 1e-6 and found["optimizer.state.param.w"] < 1e-6  # and so do the weights


@pytest.mark.parametrize("wrong", [0.0, 1.01], ids=["not updated", "1 % too much"])
def test_wrong_updates_of_a_weight_that_starts_at_zero_are_seen(wrong: float) -> None:
    gradient = torch.linspace(1.0, 2.0, 100)
    one, other = (_first_step(gradient, torch.zeros(100)) for _ in range(2))
    other["w"] = wrong * other["w"]
    found = _apart(one, other)
    assert math.isclose(found["w"], abs(1 - wrong), rel_tol=1e-4)
    assert found["optimizer.state.param.w"] == 0.0


def test_a_weight_without_gradient_is_compared() -> None:
    """Of an expert without tokens the moments are zero, and equal."""
    one, other = (_first_step(torch.zeros(4), torch.full((4,), value)) for value in (1.0, 1.5))
    assert math.isclose(_apart(one, other)["w"], 0.5)


def test_what_cannot_be_compared_differs_infinitely() -> None:
    one = {"missing": torch.ones(1), "shape": torch.ones(2), "nan": torch.ones(2), "same": torch.zeros(2)}
    other = {"new": torch.ones(1), "shape": torch.ones(3), "nan": torch.tensor([1.0, math.nan]), "same": torch.zeros(2)}
    found = _apart(one, other)
    assert {name for name, value in found.items() if value == math.inf} == {"missing", "new", "shape", "nan"}
    assert found["same"] == 0.0
    assert largest([]).value == 0.0


def test_scales_of_fp8_are_left_out() -> None:
    assert _apart({"w.fp8_state": torch.ones(1)}, {}) == {}
