"""The content of a micro-batch, the interface of its sources, and how it fits static capacities. mixture.py makes them.

b sequences of a micro-batch, s tokens of a sequence, K modalities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mmscale.data.stream.context_rows import ContextRows


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """The input of one forward and backward pass. NumPy arrays on the host.

    A sequence holds whole documents followed by padding, which counts as one more document, so that it attends only to
    itself. With `data.document_multiple` a document may itself end with padding, after its EOS. The label of a token is
    the next token of its document; the last token (EOS) has none, and neither has padding. So a sequence has exactly s
    input tokens, not s + 1, and EOS is learned as a label.

    Attributes:
        tokens: ids, PAD after the documents, int64 [b, s].
        labels: next ids, PAD if there is none, int64 [b, s].
        loss_mask: 1 where the label is trained on, float32 [b, s].
        position_ids: position inside the document, int64 [b, s].
        document_ids: number of the document inside the sequence; a token attends to its own document only, int32 [b,
            s].
        modality_ids: modality of the input token, -1 for padding, int8 [b, s].
        counts: tokens per modality.
        context: the tokens of each context-parallel rank, of which this one computes its own; None: it computes all.
        everyone: tokens per modality of each sequence of the micro-batches that the ranks of an expert-parallel group
            process at the same time, including this one, int64 [R, b, K]; None: only this one, to be counted.
        label_counts: trained labels per modality of the label.
        sources: position in the blend of each sequence's source, -1 for an empty sequence, int64 [b].
        index: number of the micro-batch.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    loss_mask: NDArray[np.float32]
    position_ids: NDArray[np.int64]
    document_ids: NDArray[np.int32]
    modality_ids: NDArray[np.int8]
    counts: tuple[int, ...]
    label_counts: tuple[int, ...]
    sources: NDArray[np.int64]
    index: int
    everyone: NDArray[np.int64] | None = None
    context: ContextRows | None = None


class Numbered(Protocol):
    """Micro-batches by number, the same on every rank."""

    def micro_batch(self, index: int) -> MicroBatch:
        """The micro-batch with this number."""

    def sequence_counts(self, index: int) -> NDArray[np.int64]:
        """Tokens per modality of each of its sequences, int64 [b, K]."""


@dataclass(frozen=True)
class SlotUsage:
    """How a micro-batch fits static capacities, per modality [tokens]."""

    overflow: tuple[int, ...]  # tokens beyond the nominal count, for which no expert has a slot
    unused: tuple[int, ...]  # nominal slots that no token fills


def slot_usage(batch: MicroBatch, *, nominal: tuple[int, ...], scope: Literal["sequence", "micro_batch"]) -> SlotUsage:
    """Tokens over the nominal counts and slots left empty, computed on the host for logging.

    Args:
        batch: the micro-batch.
        nominal: nominal tokens of each modality in one sequence (scope "sequence") or in the micro-batch.
        scope: among which tokens experts choose, as in model.experts.scope.
    """
    rows = batch.modality_ids if scope == "sequence" else batch.modality_ids.reshape(1, -1)
    found = (rows[:, :, None] == np.arange(len(nominal))).sum(axis=1)
    over = found - np.array(nominal)
    return SlotUsage(
        overflow=tuple(np.maximum(over, 0).sum(axis=0).tolist()),
        unused=tuple(np.maximum(-over, 0).sum(axis=0).tolist()),
    )
