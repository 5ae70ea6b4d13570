"""Sequences that are split over context-parallel ranks: gathers them in their order, and sums partial results.

Whatever depends on other tokens (attention, expert choice, Mixture-of-Depths) works on gathered tensors in the order of
the sequence, so that ties between tokens are broken as in one process. mmscale.data.stream.context_rows decides, when a
batch is read, which rank gets which token.

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
    """Which rank holds which tokens of the sequences of a micro-batch.

    Attributes:
        order: [S, B] int64, positions of rank 0's tokens, then those of rank 1, and so on, ascending for each rank.
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
        """[S * B] row of each token of the sequences, in order, among the gathered rows: the inverse of `_rows`."""
        return torch.argsort(self._rows)

    def local(self, tensor: Tensor) -> Tensor:
        """This rank's rows of a tensor that all ranks hold: [S, B, ...] -> [N, B, ...]."""
        index = self.own.view(*self.own.shape, *([1] * (tensor.dim() - 2)))
        return tensor.gather(0, index.expand(*self.own.shape, *tensor.shape[2:]))

    def gather(self, tensor: Tensor, group: ProcessGroup) -> Tensor:
        """[N, B, ...] of every rank -> [S, B, ...] in the sequence's order, on every rank.

        Backward sums the gradients of all ranks and returns each rank its own rows, because each rank computes other
        outputs from the gathered tensor.
        """
        return self.gather_rows(tensor, group, None).view(self.order.shape[0], *tensor.shape[1:])

    def gather_rows(self, tensor: Tensor, group: ProcessGroup, rows: Tensor | None) -> Tensor:
        """Like `gather`, flattened to [S * B, ...], or only these rows of that: [K] -> [K, ...]."""
        self._check(group)
        gathered = gather_from_sequence_parallel_region(tensor.contiguous(), group=group)
        return gathered.flatten(0, 1).index_select(0, self._places if rows is None else self._places[rows])

    def scatter_sum(self, tensor: Tensor, group: ProcessGroup) -> Tensor:
        """Partial [S, B, ...] of every rank -> [N, B, ...]: this rank's rows of the sum. Backward gathers."""
        self._check(group)
        rows = tensor.flatten(0, 1).index_select(0, self._rows).view(tensor.shape)
        return reduce_scatter_to_sequence_parallel_region(rows, group=group)

    def dealt(self, length: int) -> ContextSplit:
        """Splits the first `length` positions of every sequence over the same ranks, zig-zag in 2 * CP pieces."""
        # Rank r gets pieces r and 2 * CP - 1 - r: an early and a late one. Causal attention costs more for later
        # tokens, so this gives all ranks the same work. With CP = 2 rank 0 gets pieces 0 and 3, rank 1 gets pieces 1
        # and 2.
        pieces = torch.arange(length, device=self.order.device).view(2 * self.size, -1)
        order = torch.cat([pieces[[rank, 2 * self.size - 1 - rank]].reshape(-1) for rank in range(self.size)])
        return ContextSplit(order.unsqueeze(1).repeat(1, self.order.shape[1]), self.rank, self.size)

    def _check(self, group: ProcessGroup) -> None:
        assert (group.rank(), group.size()) == (self.rank, self.size), "the batch was split for another layout"
