"""Which micro-batches of a global batch a data-parallel rank reads, and which its expert-parallel ranks read meanwhile.

Numbers only: it opens no data and knows no process groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from mmscale.data.mixture import MicroBatch, Numbered


@dataclass(frozen=True)
class Part:
    """A rank's part of every global batch: of the micro-batches n, n + 1, ... rank r of d reads n + r, n + r + d, ...

    Attributes:
        rank: this rank's place among data-parallel ranks.
        size: data-parallel ranks.
        together: places of the ranks that exchange tokens with this one's experts, in their order, this one among
            them; empty: it has its experts to itself.
    """

    rank: int = 0
    size: int = 1
    together: tuple[int, ...] = ()

    def numbers(self, first: int, count: int) -> range:
        """This rank's micro-batches of the global batch first..first+count-1."""
        return range(first + self.rank, first + count, self.size)

    def read(self, mixture: Numbered, number: int, *, last: int | None = None) -> MicroBatch:
        """One of this rank's micro-batches, with the counts of what the expert-parallel ranks process meanwhile.

        Args:
            mixture: the stream of micro-batches.
            number: of the micro-batch.
            last: number of the last one that there is; later ones repeat it. None: there is no end.
        """
        own = mixture.micro_batch(self._inside(number, last))
        if len(self.together) < 2:
            return own
        beside = [self._inside(number - self.rank + place, last) for place in self.together]
        return replace(own, everyone=np.stack([mixture.sequence_counts(one) for one in beside]))

    def batch(self, mixture: Numbered, first: int, count: int) -> Iterator[MicroBatch]:
        """This rank's micro-batches of a global batch."""
        return (self.read(mixture, number) for number in self.numbers(first, count))

    @staticmethod
    def _inside(number: int, last: int | None) -> int:
        return number if last is None else min(number, last)
