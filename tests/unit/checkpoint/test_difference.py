"""Checkpoints are compared tensor by tensor, each relative to its own norm."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmscale.checkpoint.difference import FLOOR, differences, largest
from mmscale.checkpoint.tensors import TensorEntry

MOMENT = "optimizer.state.exp_avg."


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
    return {found.name: found.value for found in differences(*sources)}


def test_a_difference_is_relative_to_the_tensor() -> None:
    one = {f"{MOMENT}a": torch.ones(4), f"{MOMENT}b": torch.full((4,), 1e-3), "w": torch.ones(2)}
    other = {f"{MOMENT}a": torch.ones(4), f"{MOMENT}b": torch.full((4,), 2e-3), "w": torch.full((2,), 1.5)}
    found = _apart(one, other)
    assert found[f"{MOMENT}a"] == 0.0
    assert math.isclose(found[f"{MOMENT}b"], 1.0, rel_tol=1e-6)
    assert list(found) == [f"{MOMENT}b", "w", f"{MOMENT}a"]  # the worst first
    sources: list[Any] = [Held(**one), Held(**other)]
    assert largest(differences(*sources)).is_gradient


def test_a_tensor_of_rounding_errors_is_measured_against_its_kind() -> None:
    one = {f"{MOMENT}a": torch.ones(1), f"{MOMENT}b": torch.tensor([1e-9])}
    other = {f"{MOMENT}a": torch.ones(1), f"{MOMENT}b": torch.tensor([-1e-9])}
    assert math.isclose(_apart(one, other)[f"{MOMENT}b"], 2e-9 / FLOOR, rel_tol=1e-5)
    # Weights are large, but they are another kind.
    assert math.isclose(_apart(one | {"w": torch.full((1,), 1e9)}, other | {"w": torch.full((1,), 1e9)})[f"{MOMENT}b"],
                        2e-9 / FLOOR, rel_tol=1e-5)  # fmt: skip


def test_what_cannot_be_compared_differs_infinitely() -> None:
    one = {"missing": torch.ones(1), "shape": torch.ones(2), "nan": torch.ones(2), "same": torch.zeros(2)}
    other = {"new": torch.ones(1), "shape": torch.ones(3), "nan": torch.tensor([1.0, math.nan]), "same": torch.zeros(2)}
    found = _apart(one, other)
    assert {name for name, value in found.items() if value == math.inf} == {"missing", "new", "shape", "nan"}
    assert found["same"] == 0.0
    assert largest([]).value == 0.0


def test_scales_of_fp8_are_left_out() -> None:
    assert _apart({"w.fp8_state": torch.ones(1)}, {}) == {}
