"""Sums over the micro-batches of a step, from which buffers of the model are updated after it.

Loads are those of token choice (token_choice.py); the cut-offs of thresholds are in thresholds.py.
Shapes: S tokens of a sequence, B sequences of the micro-batch, E experts of a group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Key = tuple[int, str, int]  # layer, group of experts and micro-batch


class FirstPass:
    """Whether a layer sees a micro-batch for the first time, and not again by recompute.

    Layers see micro-batches in the order of their numbers, and only earlier ones again, so the newest number of each
    layer is all that is kept.
    """

    def __init__(self) -> None:
        self._newest: dict[tuple[int, str], int] = {}

    def clear(self) -> None:
        """Forget all micro-batches; called at the start of a step."""
        self._newest.clear()

    def of(self, key: Key) -> bool:
        """Whether this is the first call with this key since `clear`."""
        place, micro_batch = key[:2], key[2]
        if place in self._newest and micro_batch <= self._newest[place]:
            return False
        self._newest[place] = micro_batch
        return True


class StepSums:
    """Sums of a step's micro-batches on this rank, with the buffer that each one updates.

    Attributes:
        sums: by layer and group.
    """

    def __init__(self) -> None:
        self.sums: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        self._first_pass = FirstPass()

    def clear(self) -> None:
        """Reset all sums; called at the start of a step."""
        self.sums.clear()
        self._first_pass.clear()

    def add_once(self, buffer: Tensor, key: Key, values: Callable[[], Tensor]) -> None:
        """Add values, unless those of this key were added: recompute repeats every choice.

        Args:
            buffer: the buffer to update after the step.
            key: of the choice.
            values: computes what is added, always in the same shape; not called for a repeated choice.
        """
        if not self._first_pass.of(key):
            return
        found, known = values(), self.sums.get(key[:2])
        self.sums[key[:2]] = (buffer, found if known is None else known[1] + found)


class Loads(StepSums):
    """Tokens that chose each expert in a step's micro-batches on this rank, dropped ones included: [E] fp64 by bias."""

    def add(self, bias: Tensor, taken: Tensor, *, key: Key) -> None:
        """Add the tokens of one choice, [S, B, E] bool, for a bias that is updated after the step."""
        self.add_once(bias, key, lambda: taken.sum(dim=(0, 1), dtype=torch.float64))
