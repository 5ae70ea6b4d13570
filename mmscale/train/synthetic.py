"""Micro-batches made from a number: for layout checks and benchmarks, where what is learned does not matter.

Same shapes and facts as real data: documents of text with image blocks inside, padding at the end.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from mmscale.config import Config
from mmscale.data.mixture import MicroBatch
from mmscale.data.vocab import EOS, PAD, SPECIAL_TOKENS, Vocabulary


class SyntheticMixture:
    """A pure function from an index to a micro-batch.

    Args:
        config: shapes, vocabulary, seed.
        share: share of each modality's tokens; the first modality (text) gets what the others leave over.
        absent: modality that no micro-batch with an odd index holds, for checks of empty groups; None: all are there.
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

    def micro_batch(self, index: int) -> MicroBatch:
        """The micro-batch with this number, the same on every rank."""
        rng = np.random.Generator(np.random.Philox(key=[self.config.run.seed, index]))
        batch, length = self.config.train.micro_batch_size, self.config.model.seq_length
        tokens = np.full((batch, length), PAD, dtype=np.int64)
        documents = np.zeros((batch, length), dtype=np.int32)
        positions = np.zeros((batch, length), dtype=np.int64)
        for row in range(batch):
            filled = length - int(self.padding * length)
            borders = np.linspace(0, filled, self.documents + 1).astype(int)
            for number, (start, end) in enumerate(pairwise(borders)):
                tokens[row, start:end] = self._document(rng, end - start, absent=self.absent if index % 2 else None)
                documents[row, start:end] = number
                positions[row, start:end] = np.arange(end - start)
            documents[row, filled:] = self.documents
            positions[row, filled:] = np.arange(length - filled)
        labels = np.roll(tokens, -1, axis=1)
        last = np.ones((batch, length), dtype=bool)
        last[:, :-1] = documents[:, 1:] != documents[:, :-1]
        mask = (~last & (tokens != PAD)).astype(np.float32)
        labels[mask == 0] = PAD
        modality, label_modality = self.vocabulary.modality_of(tokens), self.vocabulary.modality_of(labels)
        names = range(len(self.vocabulary.names))
        return MicroBatch(
            tokens=tokens,
            labels=labels,
            loss_mask=mask,
            position_ids=positions,
            document_ids=documents,
            modality_ids=modality,
            counts=tuple(int((modality == m).sum()) for m in names),
            label_counts=tuple(int(((label_modality == m) & (mask > 0)).sum()) for m in names),
            sources=np.zeros(batch, dtype=np.int64),
            index=index,
        )

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
