"""Micro-batches of documents of which the log-probabilities of some tokens are asked: what tasks put to a model.

Arrays only, the same on every rank. mmscale.train.steps.answers runs the model.

Shapes: P places, N tokens that are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmscale.data.stream.micro_batch import MicroBatch
from mmscale.data.stream.packed import fill_rows, pack_rows
from mmscale.data.vocab import Vocabulary


@dataclass(frozen=True)
class Asked:
    """A document whose end is asked for.

    Attributes:
        ids: the document. The model reads all but the last token, which nothing depends on: under batch routing an
            answer in the input could be read from the routing of the question.
        start: the first token that is asked for; at least 1.
    """

    ids: tuple[int, ...]
    start: int

    @property
    def read(self) -> tuple[int, ...]:
        """What the model reads."""
        return self.ids[:-1]


@dataclass(frozen=True)
class Answers:
    """What a model says about the ends of documents, an entry for each.

    Attributes:
        log_p: float64, sum of the log-probabilities of the tokens that were asked for.
        likeliest: int64, how many of them no other token is likelier than.
    """

    log_p: NDArray[np.float64]
    likeliest: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class WantedTokens:
    """Tokens of a micro-batch that are asked for.

    Attributes:
        rows, positions: int64 [P], places whose logits are needed.
        places: int64 [N], the place of each token that is asked for, as an index into `rows`.
        tokens: int64 [N].
        asked: int64 [N], number of the document that asks.
    """

    rows: NDArray[np.int64]
    positions: NDArray[np.int64]
    places: NDArray[np.int64]
    tokens: NDArray[np.int64]
    asked: NDArray[np.int64]


class PackedQuestions:
    """Documents in micro-batches of one size; those that read the same tokens share a place.

    Args:
        asked: the documents, each read at most `seq_length` tokens.
        vocabulary: gives modalities.
        seq_length: tokens of a sequence.
        rows: sequences of a micro-batch; the last one is filled up with its own sequences.
    """

    def __init__(self, asked: Sequence[Asked], *, vocabulary: Vocabulary, seq_length: int, rows: int) -> None:
        self.vocabulary, self.seq_length = vocabulary, seq_length
        self._askers: dict[tuple[int, ...], list[int]] = {}
        for number, one in enumerate(asked):
            self._askers.setdefault(one.read, []).append(number)
        self._asked = asked
        self._read = [np.array(read, dtype=np.int64) for read in self._askers]
        # Tokens per modality of each document that is read, int64 [documents, modalities].
        names = np.arange(len(vocabulary.names))
        self._counts = np.array([(vocabulary.modality_of(ids)[:, None] == names).sum(axis=0) for ids in self._read])
        filled = fill_rows(self._read, seq_length=seq_length)
        self._parts = [filled[first : first + rows] for first in range(0, len(filled), rows)]
        self._rows = rows

    def __len__(self) -> int:
        """Micro-batches."""
        return len(self._parts)

    def micro_batch(self, index: int) -> MicroBatch:
        """The micro-batch with this number."""
        part = self._parts[index]
        whole = [part[place % len(part)] for place in range(self._rows)]
        content = [[self._read[number] for number in row] for row in whole]
        return pack_rows(content, vocabulary=self.vocabulary, seq_length=self.seq_length)[0]

    def sequence_counts(self, index: int) -> NDArray[np.int64]:
        """Tokens per modality of each of its sequences, int64 [rows, modalities]."""
        part = self._parts[index]
        rows = [self._counts[part[place % len(part)]].sum(axis=0) for place in range(self._rows)]
        return np.stack(rows)

    def wanted(self, index: int) -> WantedTokens:
        """What is asked for in a micro-batch."""
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
                first += len(self._read[document])
        places, tokens, asked = np.array(found, dtype=np.int64).reshape(-1, 3).T
        rows, positions = np.array(list(known), dtype=np.int64).reshape(-1, 2).T
        return WantedTokens(rows, positions, places, tokens, asked)
