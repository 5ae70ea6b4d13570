"""Sums over the micro-batches of a step, from which buffers of the model are updated after it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Key = tuple[int, str, int]  # layer, group of experts and micro-batch


class StepSums:
    """Sums of a step's micro-batches on this rank, with the buffer that each one updates.

    Layers see micro-batches in the order of their numbers. An earlier one can only be repeated, by recompute.

    Attributes:
        sums: by layer and group.
    """

    def __init__(self) -> None:
        self.sums: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        self._newest: dict[tuple[int, str], int] = {}  # micro-batch that was added last

    def clear(self) -> None:
        """Reset all sums; called at the start of a step."""
        self.sums.clear()
        self._newest.clear()

    def add_once(self, buffer: Tensor, key: Key, values: Callable[[], Tensor]) -> None:
        """Add values, unless those of this key were added: recompute repeats every choice.

        Args:
            buffer: the buffer to update after the step.
            key: of the choice.
            values: computes what is added, always in the same shape; not called for a repeated choice.
        """
        place, micro_batch = key[:2], key[2]
        if place not in self.sums:
            self.sums[place] = buffer, values()
        elif micro_batch > self._newest[place]:
            self.sums[place] = buffer, self.sums[place][1] + values()
        else:
            return
        self._newest[place] = micro_batch
