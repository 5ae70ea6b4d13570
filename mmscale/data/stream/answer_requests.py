"""Micro-batches of documents with a request for the log-probabilities of some of their tokens, used by tasks.

Arrays only, the same on every rank. mmscale.train.steps.answers runs the model.

Shapes: P places, N requested tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mmscale.data.stream.context_rows import ContextRows
from mmscale.data.stream.micro_batch import MicroBatch
from mmscale.data.stream.packed import fill_rows, pack_rows, padded_sizes
from mmscale.data.vocab import Vocabulary


@dataclass(frozen=True)
class AnswerRequest:
    """A document for whose last tokens log-probabilities are requested.

    Attributes:
        ids: the document. The model reads all except the last token, which no request needs: under batch routing an
            answer in the input could be read from the routing of the question.
        start: the first requested token; at least 1.
    """

    ids: tuple[int, ...]
    start: int

    @property
    def read(self) -> tuple[int, ...]:
        """The input of the model."""
        return self.ids[:-1]


@dataclass(frozen=True)
class Answers:
    """The model's answers, an entry for each document.

    Attributes:
        log_p: float64, sum of the log-probabilities of the requested tokens.
        likeliest: int64, number of requested tokens that are the most likely ones in their places.
    """

    log_p: NDArray[np.float64]
    likeliest: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class WantedTokens:
    """The requested tokens of a micro-batch.

    Attributes:
        rows, positions: int64 [P], places whose logits are needed.
        places: int64 [N], the place of each requested token, as an index into `rows`.
        tokens: int64 [N].
        asked: int64 [N], number of the document that the request belongs to.
    """

    rows: NDArray[np.int64]
    positions: NDArray[np.int64]
    places: NDArray[np.int64]
    tokens: NDArray[np.int64]
    asked: NDArray[np.int64]

    def of_rank(self, context: ContextRows | None) -> WantedTokens:
        """The requests whose places a context-parallel rank has; positions are those among the rank's tokens.

        Places that it does not have become its first token, so that shapes are those of all ranks.
        """
        if context is None:
            return self
        among = context.own[self.rows] == self.positions[:, None]  # [P, s / size]
        here = among.any(axis=1)
        mine = here[self.places]
        return replace(
            self,
            positions=among.argmax(axis=1),
            places=self.places[mine],
            tokens=self.tokens[mine],
            asked=self.asked[mine],
        )


class PackedQuestions:
    """Documents packed in micro-batches of one size; documents with the same input share a place.

    Args:
        asked: the documents; the input of each has at most `seq_length` tokens.
        vocabulary: gives modalities.
        seq_length: tokens of a sequence.
        rows: sequences of a micro-batch; the last one is padded with repetitions of its own sequences.
        multiple: documents are padded to a multiple of this, as with `data.document_multiple`.
    """

    def __init__(
        self, asked: Sequence[AnswerRequest], *, vocabulary: Vocabulary, seq_length: int, rows: int, multiple: int = 1
    ) -> None:
        self.vocabulary, self.seq_length, self._multiple = vocabulary, seq_length, multiple
        self._askers: dict[tuple[int, ...], list[int]] = {}
        for number, one in enumerate(asked):
            self._askers.setdefault(one.read, []).append(number)
        self._asked = asked
        self._read = [np.array(read, dtype=np.int64) for read in self._askers]
        # Tokens per modality in the input of each document, int64 [documents, modalities].
        names = np.arange(len(vocabulary.names))
        self._counts = np.array([(vocabulary.modality_of(ids)[:, None] == names).sum(axis=0) for ids in self._read])
        filled = fill_rows(self._read, seq_length=seq_length, multiple=multiple)
        self._parts = [filled[first : first + rows] for first in range(0, len(filled), rows)]
        self._rows = rows
        self._sizes = padded_sizes(self._read, multiple)

    def __len__(self) -> int:
        """Number of micro-batches."""
        return len(self._parts)

    def micro_batch(self, index: int) -> MicroBatch:
        """The micro-batch with this number."""
        part = self._parts[index]
        whole = [part[place % len(part)] for place in range(self._rows)]
        content = [[self._read[number] for number in row] for row in whole]
        packed, _ = pack_rows(content, vocabulary=self.vocabulary, seq_length=self.seq_length, multiple=self._multiple)
        return packed

    def sequence_counts(self, index: int) -> NDArray[np.int64]:
        """Tokens per modality of each of its sequences, int64 [rows, modalities]."""
        part = self._parts[index]
        rows = [self._counts[part[place % len(part)]].sum(axis=0) for place in range(self._rows)]
        return np.stack(rows)

    def wanted(self, index: int) -> WantedTokens:
        """The requested tokens of a micro-batch."""
        askers = list(self._askers.values())
        known: dict[tuple[int, int], int] = {}
        found: list[tuple[int, int, int]] = []
        for row, documents in enumerate(self._parts[index]):
            first = 0
            for document in documents:
                for number in askers[document]:
                    one = self._asked[number]
                    for at in range(one.start, len(one.ids)):
                        place = known.setdefault((row, first + at - 1), len(known))
                        found.append((place, one.ids[at], number))
                first += self._sizes[document]
        places, tokens, asked = np.array(found, dtype=np.int64).reshape(-1, 3).T
        rows, positions = np.array(list(known), dtype=np.int64).reshape(-1, 2).T
        return WantedTokens(rows, positions, places, tokens, asked)
