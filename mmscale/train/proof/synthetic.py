"""Synthetic micro-batches from an index, for layout checks and benchmarks.

They have the shapes and per-token data of real batches: documents of text with image blocks inside, padding at the end.
If the vocabulary has the tokens of chat messages, only the end of some documents is trained on, like an answer. With
causal masking the documents have holes.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mmscale.config import Config
from mmscale.data.holes import PER_SPAN, hole_tokens, rotation
from mmscale.data.stream.causal_masking import SpanChoice, masking_of, token_runs
from mmscale.data.stream.micro_batch import MicroBatch
from mmscale.data.stream.packed import pack_rows
from mmscale.data.vocab import EOS, SPECIAL_TOKENS, Vocabulary


class SyntheticMixture:
    """A pure function from an index to a micro-batch.

    Args:
        config: shapes, vocabulary, seed.
        share: share of each modality's tokens; the first modality (text) gets the rest.
        absent: modality that is missing in micro-batches with an odd index, to test empty groups; None: none is.
        documents: documents per sequence.
        padding: share of each sequence that is padding.
    """

    def __init__(
        self,
        config: Config,
        *,
        share: dict[str, float],
        absent: str | None = None,
        documents: int = 3,
        padding: float = 0.03,
    ) -> None:
        self.config = config
        self.vocabulary = Vocabulary.from_config(config.vocab)
        self.share = share
        self.absent = absent
        self.documents = documents
        self.padding = padding
        masking = masking_of(config)
        self._choice: SpanChoice | None = None
        if masking is not None:
            seed, length = config.run.seed, config.model.seq_length
            self._choice = SpanChoice(masking=masking, seed=seed, source=0, seq_length=length)

    def micro_batch(self, index: int) -> MicroBatch:
        """The micro-batch with this number, the same on every rank."""
        rng = np.random.Generator(np.random.Philox(key=[self.config.run.seed, index]))
        length, multiple = self.config.model.seq_length, self.config.data.document_multiple
        borders = np.linspace(0, length - int(self.padding * length), self.documents + 1).astype(int)
        borders = borders // multiple * multiple
        # With `document_multiple`, every second document is shorter and padded to a multiple.
        short = [number % 2 * (multiple // 2) for number in range(self.documents)]
        # A large multiple leaves no room for some of them.
        if not any(end > start for start, end in pairwise(borders)):
            borders[1:] = length
        absent = self.absent if index % 2 else None
        rows = self.config.train.micro_batch_size
        content = [
            [
                self._read(rng, end - start - less, absent=absent, number=number)
                for (start, end), less, number in zip(pairwise(borders), short, numbers, strict=True)
                if end > start
            ]
            for numbers in np.arange(rows * self.documents).reshape(rows, -1) + index * rows * self.documents
        ]
        batch, _ = pack_rows(content, vocabulary=self.vocabulary, seq_length=length, multiple=multiple)
        if self._choice is not None:
            holes = np.isin(batch.labels, hole_tokens(self.vocabulary)[:-1])
            batch = _trained_on(batch, batch.loss_mask * ~holes, self.vocabulary)
        elif self.vocabulary.reserved:
            batch = _answers_only(batch, rng, self.vocabulary)
        return replace(batch, index=index)

    def sequence_counts(self, index: int) -> NDArray[np.int64]:
        """Tokens per modality of each sequence of a micro-batch, int64 [b, K]."""
        ids = self.micro_batch(index).modality_ids
        counts: NDArray[np.int64] = (ids[:, :, None] == np.arange(len(self.vocabulary.names))).sum(axis=1)
        return counts

    def _read(self, rng: np.random.Generator, length: int, *, absent: str | None, number: int) -> np.ndarray:
        """A document, under causal masking with 0, 1 or 2 spans moved to its end."""
        spans = number % 3 if self._choice is not None else 0
        ids = self._document(rng, length - PER_SPAN * spans, absent=absent)
        if self._choice is None or not spans:
            return ids
        runs = token_runs(ids, self.vocabulary.modality_of(ids), self.vocabulary)
        chosen = self._choice.spans(runs, number=spans, document=number, epoch=0, end=len(ids) - 1)
        return np.append(ids, hole_tokens(self.vocabulary))[rotation(len(ids), chosen)]

    def _document(self, rng: np.random.Generator, length: int, *, absent: str | None) -> np.ndarray:
        """Text with one contiguous block of each other modality inside, ending in EOS."""
        first, end = self.vocabulary.ranges[0]
        ids = rng.integers(first + len(SPECIAL_TOKENS), end, size=length)
        at = int(rng.integers(1, 4))
        for name, (low, high) in zip(self.vocabulary.names[1:], self.vocabulary.ranges[1:], strict=True):
            if name == absent:
                continue
            block = min(round(self.share[name] * length), length - at - 1)
            ids[at : at + block] = rng.integers(low, high, size=max(block, 0))
            at += max(block, 0)
        if absent == self.vocabulary.names[0]:
            low, high = self.vocabulary.ranges[1]
            ids[:] = rng.integers(low, high, size=length)
            return ids
        ids[-1] = EOS
        return ids


def _answers_only(batch: MicroBatch, rng: np.random.Generator, vocabulary: Vocabulary) -> MicroBatch:
    """The batch with a loss on the last labels of each document, on all of them, or on none."""
    mask = batch.loss_mask.copy()
    for row, documents in enumerate(batch.document_ids):
        for document in np.unique(documents):
            own = np.flatnonzero((documents == document) & (mask[row] > 0))
            mask[row, own[: int(rng.integers(0, len(own) + 1))]] = 0.0
    return _trained_on(batch, mask, vocabulary)


def _trained_on(batch: MicroBatch, mask: NDArray[np.float32], vocabulary: Vocabulary) -> MicroBatch:
    """The batch with another loss mask."""
    modality = vocabulary.modality_of(batch.labels)
    counts = tuple(int(((modality == m) & (mask > 0)).sum()) for m in range(len(vocabulary.names)))
    return replace(batch, loss_mask=mask, label_counts=counts)
