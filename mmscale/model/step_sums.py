"""Sums over the micro-batches of a step, from which buffers of the model are updated after it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Key = tuple[int, str, int]  # layer, group of experts and micro-batch


class StepSums:
    """Sums of a step's micro-batches on this rank, with the buffer that each one updates.

    Attributes:
        sums: by layer and group.
    """

    def __init__(self) -> None:
        self.sums: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        self._seen: set[Key] = set()

    def clear(self) -> None:
        """Reset all sums; called at the start of a step."""
        self.sums.clear()
        self._seen.clear()

    def add_once(self, buffer: Tensor, key: Key, values: Callable[[], Tensor]) -> None:
        """Add values, unless those of this key were added: recompute repeats every choice.

        Args:
            buffer: the buffer to update after the step.
            key: of the choice.
            values: computes what is added, always in the same shape.
        """
        if key in self._seen:
            return
        self._seen.add(key)
        found, known = values(), self.sums.get(key[:2])
        self.sums[key[:2]] = (buffer, found if known is None else known[1] + found)
