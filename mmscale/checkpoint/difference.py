"""Compares two checkpoints of one step tensor by tensor, whatever layouts wrote them. It changes nothing.

After the first step of Adam the first moment is (1 - beta1) times the clipped gradient, so comparing first moments
compares the gradient of every parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from mmscale.checkpoint.tensors import SCALING, TensorSource

FIRST_MOMENT = "optimizer.state.exp_avg."
_MASTER = "optimizer.state.param."
# Prefixes of groups of tensors with comparable norms; all other names are weights or thresholds of the model.
_KINDS = (FIRST_MOMENT, "optimizer.state.exp_avg_sq.", _MASTER)
# A tensor's difference is divided by its norm, or, if that is larger, by this share of the norm of all tensors of its
# kind: a gradient whose terms nearly cancel consists of rounding errors.
FLOOR = 1e-4


@dataclass(frozen=True)
class TensorDifference:
    """The difference of one tensor between two checkpoints.

    Attributes:
        name: the checkpoint's name of it.
        value: norm of the difference, relative to the norm of the tensor; infinite if it is NaN, or if only one of the
            two checkpoints has the tensor, or has it in another shape.
    """

    name: str
    value: float

    @property
    def is_gradient(self) -> bool:
        """Whether it is a first moment."""
        return self.name.startswith(FIRST_MOMENT)


def differences(reference: TensorSource, other: TensorSource, *, within: float) -> list[TensorDifference]:
    """The difference of every tensor, the largest first. FP8's scales are excluded: they follow from amax histories.

    Of weights, only elements are compared whose own first moments agree within `within`. Adam moves an element by lr *
    g / (|g| + eps), so a gradient that is zero but for rounding moves it by any part of lr. The bias of keys has such
    elements, and a bias that starts at zero consists of this update alone. Of all other elements the update differs
    by at most `within` of itself if the moments agree and the optimizer is right.

    Args:
        reference: the checkpoint whose norms are used.
        other: the checkpoint that is compared with it.
        within: relative difference that is allowed.
    """
    ours, theirs = (set(_compared(source.names())) for source in (reference, other))
    found = [TensorDifference(name, math.inf) for name in ours ^ theirs]
    apart: dict[str, float] = {}
    norms: dict[str, float] = {}
    of_kind: dict[str, float] = {}
    both = ours & theirs
    for name in sorted(both):
        if reference.entry(name).shape != other.entry(name).shape:
            found.append(TensorDifference(name, math.inf))
            continue
        tensor = reference.read(name).double()
        difference = tensor - other.read(name).double()
        moment = FIRST_MOMENT + name.removeprefix(_MASTER)
        if moment in both and _kind(name) in ("", _MASTER) and reference.entry(moment).shape == tuple(tensor.shape):
            difference = difference.masked_fill(_undetermined(moment, reference, other, within), 0.0)
        norms[name], apart[name] = float(tensor.norm()), float(difference.norm())
        of_kind[_kind(name)] = math.hypot(of_kind.get(_kind(name), 0.0), norms[name])
    for name, value in apart.items():
        scale = max(norms[name], FLOOR * of_kind[_kind(name)])
        found.append(TensorDifference(name, _ratio(value, scale)))
    return sorted(found, key=lambda one: (-one.value, one.name))


def _undetermined(moment: str, reference: TensorSource, other: TensorSource, within: float) -> Tensor:
    """Elements whose first moments differ by more than `within` of themselves."""
    one, two = reference.read(moment).double(), other.read(moment).double()
    return (one - two).abs() > within * one.abs()


def _ratio(apart: float, scale: float) -> float:
    if apart == 0.0:
        return 0.0
    # NaN becomes infinity, so that it fails every comparison and is sorted first.
    return apart / scale if scale > 0.0 and math.isfinite(apart) else math.inf


def largest(found: Iterable[TensorDifference]) -> TensorDifference:
    """The largest difference; if there is none, one with an empty name."""
    return next(iter(found), TensorDifference("", 0.0))


def _compared(names: Iterable[str]) -> Iterator[str]:
    return (name for name in names if not name.endswith(SCALING))


def _kind(name: str) -> str:
    return next((kind for kind in _KINDS if name.startswith(kind)), "")
