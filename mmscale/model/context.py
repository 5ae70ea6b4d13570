"""A sequence that is split over context-parallel ranks: gathers it in its order, and sums partial results back.

What depends on other tokens (attention, expert choice, Mixture-of-Depths) works on gathered tensors in the order of the
sequence, so that ties between tokens break as in one process. Which rank has which token is decided where the batch is
read (mmscale.data.stream.context_rows).

Shapes: S tokens of a sequence, N = S / CP tokens of this rank, B sequences of the micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False)
class ContextSplit:
    """Where the tokens of the sequences of a micro-batch are.

    Attributes:
        order: [S, B] int64, positions of rank 0's tokens, then those of rank 1, and so on; each rank's ascend.
        rank: this rank.
        size: context-parallel ranks.
    """

    order: Tensor
    rank: int
    size: int

    @cached_property
    def own(self) -> Tensor:
        """[N, B] positions of this rank's tokens."""
        length = self.order.shape[0] // self.size
        return self.order[self.rank * length : (self.rank + 1) * length]

    @cached_property
    def _rows(self) -> Tensor:
        """[S * B] flat row of each entry of `order` in a [S, B, ...] tensor."""
        batch = self.order.shape[1]
        return (self.order * batch + torch.arange(batch, device=self.order.device)).reshape(-1)

    @cached_property
    def _places(self) -> Tensor:
        """[S * B] where each token of the sequence stands among the gathered rows: the inverse of `_rows`."""
        return torch.argsort(self._rows)

    def local(self, tensor: Tensor) -> Tensor:
        """This rank's rows of a tensor that all ranks hold: [S, B, ...] -> [N, B, ...]."""
        index = self.own.view(*self.own.shape, *([1] * (tensor.dim() - 2)))
        return tensor.gather(0, index.expand(*self.own.shape, *tensor.shape[2:]))

    def gather(self, tensor: Tensor, group: ProcessGroup) -> Tensor:
        """[N, B, ...] of every rank -> [S, B, ...] in the sequence's order, on every rank.

        Backward sums what all ranks made of a rank's rows: each of them uses the gathered tensor for other outputs.
        """
        self._check(group)
        rows = gather_from_sequence_parallel_region(tensor.contiguous(), group=group)
        return rows.flatten(0, 1).index_select(0, self._places).view(rows.shape)

    def scatter_sum(self, tensor: Tensor, group: ProcessGroup) -> Tensor:
        """Partial [S, B, ...] of every rank -> [N, B, ...]: this rank's rows of the sum. Backward gathers."""
        self._check(group)
        rows = tensor.flatten(0, 1).index_select(0, self._rows).view(tensor.shape)
        return reduce_scatter_to_sequence_parallel_region(rows, group=group)

    def dealt(self, length: int) -> ContextSplit:
        """Another split over the same ranks, of `length` tokens of every sequence, zig-zag in 2 * CP pieces."""
        pieces = torch.arange(length, device=self.order.device).view(2 * self.size, -1)
        order = torch.cat([pieces[[rank, 2 * self.size - 1 - rank]].reshape(-1) for rank in range(self.size)])
        return ContextSplit(order.unsqueeze(1).repeat(1, self.order.shape[1]), self.rank, self.size)

    def _check(self, group: ProcessGroup) -> None:
        assert (group.rank(), group.size()) == (self.rank, self.size), "the batch was split for another layout"
