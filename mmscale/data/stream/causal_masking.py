"""Which spans of a document causal masking moves to its end, as a pure function of (seed, source, epoch, document).

Packing has to know how long a document becomes without reading its tokens. So the number of spans follows from the
table of documents, and is one for which every arrangement of text and items has room; only their places are chosen
when the tokens are read. Differences to CM3 (arXiv 2201.07520): spans never cross the begin or end token of an item, as
in CM3Leon (arXiv 2309.02591, section 2.2), and a document's first and last token are in no span.

D documents, K modalities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmscale.config import Config
from mmscale.data.arrays import GOLDEN, finalized
from mmscale.data.holes import PER_SPAN, Span
from mmscale.data.stream.packing import Purpose, random_bits
from mmscale.data.stream.table import DocumentRows
from mmscale.data.vocab import HOLES, Vocabulary

_WORDS = 2  # random numbers of a document that are needed before its tokens are read
# P(Poisson(1) <= n) for n = 1, 2, ...: the number of spans is that variable, clamped to 1 and the number of holes.
_CUMULATED = np.cumsum([math.exp(-1.0) / math.factorial(n) for n in range(len(HOLES))])[1:]


@dataclass(frozen=True)
class Masking:
    """The settings of causal masking, `objective.cm3_rate` above 0 and `objective.image_spans`."""

    rate: float
    image_spans: str


def masking_of(config: Config) -> Masking | None:
    """The settings of a run; None: it trains on documents as they are."""
    objective = config.objective
    return Masking(objective.cm3_rate, objective.image_spans) if objective.cm3_rate else None


@dataclass(frozen=True)
class TokenRun:
    """Consecutive tokens that spans may lie in: text, or an item of another modality without begin and end token."""

    start: int
    stop: int
    item: bool


@dataclass(frozen=True, kw_only=True)
class SpanChoice:
    """Chooses the spans of one source's documents.

    Attributes:
        masking: the settings.
        seed: the run's seed.
        source: position of the source in the blend.
        seq_length: a document does not become longer than this; it gets fewer spans, or none, if it would.
    """

    masking: Masking
    seed: int
    source: int
    seq_length: int

    def numbers(
        self,
        rows: DocumentRows,
        documents: NDArray[np.int64],
        epochs: NDArray[np.int64],
        *,
        lengths: NDArray[np.int64] | None = None,
    ) -> NDArray[np.int64]:
        """Spans of each document, int64 [D]; 0: it is read as it is.

        Args:
            rows: of the documents.
            documents: their numbers.
            epochs: in which each is read.
            lengths: tokens of each with its neighbours; None: it has none.
        """
        lengths = rows.lengths if lengths is None else lengths
        text, others = rows.counts[:, 0].astype(np.int64), rows.lengths - rows.counts[:, 0]
        # Tokens of text inside, if each item has a begin and an end token. An item has as much room as two of them.
        inside = text - 2 - 2 * (others > 0) * (self.masking.image_spans == "none")
        room = np.minimum(-(-inside // 2), (self.seq_length - lengths) // PER_SPAN)
        uniform = self._uniform(documents, epochs)
        wanted = 1 + np.searchsorted(_CUMULATED, uniform[:, 1], side="right")
        masked = (uniform[:, 0] < self.masking.rate) & ~rows.masked
        return np.where(masked, np.clip(np.minimum(wanted, room), 0, len(HOLES)), 0)

    def _uniform(self, documents: NDArray[np.int64], epochs: NDArray[np.int64]) -> NDArray[np.float64]:
        """Random numbers in [0, 1), float64 [D, 2]: outputs of splitmix64, whose state Philox gives for each epoch."""
        found, of = np.unique(epochs, return_inverse=True)
        states = np.array([self._bits(1, number=epoch)[0] for epoch in found.tolist()], np.uint64)
        step = (documents[:, None] * _WORDS + np.arange(1, _WORDS + 1)).astype(np.uint64)
        return _fractions(finalized(states[of][:, None] + step * GOLDEN))

    def _bits(self, count: int, *, number: int, block: int = 0) -> NDArray[np.uint64]:
        return random_bits(count, seed=self.seed, source=self.source, purpose=Purpose.SPANS, number=number, block=block)

    def spans(self, runs: Sequence[TokenRun], *, number: int, document: int, epoch: int, end: int) -> list[Span]:
        """Spans of a document, half-open, ascending, without overlap.

        A span is in the run that a pair of random points covers most of, among those with room. There its ends
        are uniform, under the condition that spans do not touch.

        Args:
            runs: of the document.
            number: of spans.
            document: its number.
            epoch: in which it is read.
            end: place of its last token, where spans without tokens are if the runs have too little room.
        """
        runs = [one for one in runs if not one.item or self.masking.image_spans != "none"]
        whole = self.masking.image_spans == "whole"
        room = [1 if one.item and whole else (one.stop - one.start + 1) // 2 for one in runs]
        sizes = [one.stop - one.start + 1 for one in runs]  # places at which spans can begin or end
        number, document, epoch = int(number), int(document), int(epoch)
        bits = self._bits(2 * number + sum(sizes), number=epoch, block=document + 1)
        points = 1.0 + np.sort(_fractions(bits[: 2 * number]).reshape(number, 2), axis=1) * (end - 1)
        taken = [0] * len(runs)
        missing = 0
        for low, high in points.tolist():
            free = [one for one in range(len(runs)) if taken[one] < room[one]]
            if free:
                taken[max(free, key=lambda one: min(high, runs[one].stop) - max(low, runs[one].start))] += 1
            else:
                missing += 1
        found: list[Span] = []
        keys = np.split(bits[2 * number :], np.cumsum(sizes)[:-1])
        for one, count, own in zip(runs, taken, keys, strict=False):
            if one.item and whole:
                found += [(one.start, one.stop)] * count
                continue
            ends = np.sort(np.argsort(own, kind="stable")[: 2 * count]) + one.start
            found += [(start, stop) for start, stop in ends.reshape(-1, 2).tolist()]
        return [*found, *[(end, end)] * missing]


def token_runs(ids: NDArray[np.int64], modality: NDArray[np.int8], vocabulary: Vocabulary) -> list[TokenRun]:
    """The runs of a document, ascending; its first token, and its last one if it is text, are in none.

    Args:
        ids: of its tokens.
        modality: of each.
        vocabulary: gives the begin and end tokens of items.
    """
    inside = slice(1, len(ids) - int(modality[-1] == 0))
    kind = modality[inside].astype(np.int64)
    items = np.concatenate([[False], kind > 0, [False]])
    pairs = [vocabulary.marks(name) for name in vocabulary.names]
    marks = np.isin(ids[inside], [mark for pair in pairs if pair is not None for mark in pair])
    kind[marks & (items[:-2] | items[2:])] = -1
    borders = np.flatnonzero(np.diff(kind, prepend=-2, append=-2))
    runs = zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True)
    return [TokenRun(start + 1, stop + 1, bool(kind[start] > 0)) for start, stop in runs if kind[start] >= 0]


def _fractions(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) from random bits."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
