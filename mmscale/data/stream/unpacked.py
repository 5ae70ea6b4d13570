"""Takes the documents out of packed sequences: what each of them reads, predicts and is trained on. NumPy on the host.

s tokens of a document, K modalities.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mmscale.data.stream.conditions import conditional_labels
from mmscale.data.stream.micro_batch import MicroBatch
from mmscale.data.vocab import Vocabulary


@dataclass(frozen=True)
class UnpackedDocument:
    """One document, or the piece of it that one sequence has.

    Attributes:
        tokens: ids that are read, int64 [s].
        labels: id that follows each of them, int64 [s].
        trained: whether each label is trained on, bool [s].
        given: whether it counts for each condition, bool [K - 1, s], as `conditions.conditional_labels`.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    trained: NDArray[np.bool_]
    given: NDArray[np.bool_]


def unpacked(batch: MicroBatch, vocabulary: Vocabulary) -> Iterator[UnpackedDocument]:
    """The documents of a micro-batch, in order.

    Args:
        batch: a micro-batch with whole sequences.
        vocabulary: gives modalities and special tokens.
    """
    given = conditional_labels(batch, vocabulary) > 0
    for row in range(len(batch.tokens)):
        used = int((batch.modality_ids[row] >= 0).sum())  # padding comes last
        starts = [*np.flatnonzero(batch.position_ids[row, :used] == 0), used]
        for start, end in pairwise(starts):
            own = (row, slice(start, end))
            yield UnpackedDocument(
                batch.tokens[own], batch.labels[own], batch.loss_mask[own] > 0, given[:, row, start:end]
            )
