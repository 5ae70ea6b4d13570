"""Assigns the micro-batches of a global batch to data-parallel ranks, and their tokens to context-parallel ranks.

It also finds the micro-batches of expert-parallel peers. Numbers only: it opens no data and uses no process groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from mmscale.data.stream.context_rows import ContextRows, zigzag
from mmscale.data.stream.micro_batch import MicroBatch, Numbered


@dataclass(frozen=True)
class RankPart:
    """A rank's part of every global batch: of the micro-batches n, n + 1, ... rank r of d reads n + r, n + r + d, ...

    Attributes:
        rank: this rank's place among data-parallel ranks.
        size: data-parallel ranks.
        context: this rank's place among context-parallel ranks, and their number; they read the same micro-batches.
        together: places of the ranks that exchange tokens with this one's experts, in their order, including this
            one; empty: this rank does not exchange tokens.
    """

    rank: int = 0
    size: int = 1
    together: tuple[int, ...] = ()
    context: tuple[int, int] = (0, 1)

    def numbers(self, first: int, count: int) -> range:
        """This rank's micro-batches of the global batch first..first+count-1."""
        return range(first + self.rank, first + count, self.size)

    def read(self, mixture: Numbered, number: int, *, last: int | None = None) -> MicroBatch:
        """One of this rank's micro-batches, with the counts of those that expert-parallel peers process with it.

        Args:
            mixture: the stream of micro-batches.
            number: of the micro-batch.
            last: number of the last existing one; later numbers repeat it. None: there is no end.
        """
        own = self._split(mixture.micro_batch(self._inside(number, last)))
        if len(self.together) < 2:
            return own
        beside = [self._inside(number - self.rank + place, last) for place in self.together]
        return replace(own, everyone=np.stack([mixture.sequence_counts(one) for one in beside]))

    def batch(self, mixture: Numbered, first: int, count: int) -> Iterator[MicroBatch]:
        """This rank's micro-batches of a global batch."""
        return (self.read(mixture, number) for number in self.numbers(first, count))

    def _split(self, whole: MicroBatch) -> MicroBatch:
        """The micro-batch with the tokens that this rank computes. The last step, after labels and masks are made."""
        rank, size = self.context
        if size == 1:
            return whole
        return replace(whole, context=ContextRows(zigzag(whole.document_ids, size=size), rank, size))

    @staticmethod
    def _inside(number: int, last: int | None) -> int:
        return number if last is None else min(number, last)
