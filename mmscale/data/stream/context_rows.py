"""Which tokens of a sequence each context-parallel rank computes.

Every document is cut into 2 * cp equal pieces, of which rank r gets pieces r and 2 * cp - 1 - r (zig-zag inside each
document). Every rank then has the same number of tokens of each document and the same amount of causal attention. This
is the order of Transformer-Engine's `thd` partition (tex.thd_get_partitioned_indices). NumPy on the host, no process
groups.

Example: a document of 8 tokens on 2 ranks is cut into pieces 01 23 45 67. Rank 0 gets 01 and 67, rank 1 gets 23 and 45.

b sequences of a micro-batch, s tokens of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmscale.errors import DataError


@dataclass(frozen=True, eq=False)
class ContextRows:
    """The tokens of the context-parallel ranks.

    Attributes:
        order: positions of rank 0's tokens, then those of rank 1, and so on, ascending for each rank. int64 [b, s].
        rank: this rank.
        size: context-parallel ranks.
    """

    order: NDArray[np.int64]
    rank: int
    size: int

    @property
    def own(self) -> NDArray[np.int64]:
        """Positions of this rank's tokens, int64 [b, s / size]."""
        length = self.order.shape[1] // self.size
        return self.order[:, self.rank * length : (self.rank + 1) * length]


def zigzag(document_ids: NDArray[np.int32], *, size: int) -> NDArray[np.int64]:
    """Computes `ContextRows.order`.

    Args:
        document_ids: number of the document, int32 [b, s]. Padding counts as one, and neighbours have different
            numbers.
        size: context-parallel ranks.

    Raises:
        DataError: 2 * size does not divide the length of a document.
    """
    pieces = 2 * size
    begins = np.ones(document_ids.shape, bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=document_ids.size)
    if (lengths % pieces).any():
        wrong = int(np.flatnonzero(lengths % pieces)[0])
        row, place = divmod(int(starts[wrong]), document_ids.shape[1])
        raise DataError(
            f"the document at token {place} of sequence {row} has {lengths[wrong]} tokens, which {size} "
            f"context-parallel ranks cannot share: it is no multiple of 2 * {size}",
            remedy=f"set data.document_multiple to a multiple of {pieces}",
        )
    # For every token: its position inside its document, the piece that it falls into, and that piece's rank. A stable
    # sort by rank lists the tokens of rank 0 first, and keeps each rank's tokens in the order of the sequence.
    inside = np.arange(document_ids.size) - np.repeat(starts, lengths)
    piece = inside * pieces // np.repeat(lengths, lengths)
    rank = np.minimum(piece, pieces - 1 - piece).reshape(document_ids.shape)
    return np.argsort(rank, axis=1, kind="stable")
