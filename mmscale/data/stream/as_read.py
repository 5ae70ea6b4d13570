"""Documents of a source as a stream reads them: as they are stored, or rotated by causal masking.

Of a document that is read with neighbours only its own tokens are masked, as in RA-CM3 (arXiv 2211.12561). D documents.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mmscale.data.holes import PER_SPAN, Span, hole_tokens, rotation
from mmscale.data.stream.causal_masking import SpanChoice, token_runs
from mmscale.data.stream.source import Source
from mmscale.data.stream.table import DocumentRows
from mmscale.data.stream.token_check import checked_modality
from mmscale.data.vocab import HOLES, Vocabulary


@dataclass(frozen=True, eq=False)
class Documents:
    """Tokens of some documents one after another.

    Attributes:
        ids: int64 [tokens].
        modality: of each token, int8 [tokens].
        trained: whether each is trained on as a label, bool [tokens].
        lengths: tokens of each document, int64 [D].
    """

    ids: NDArray[np.int64]
    modality: NDArray[np.int8]
    trained: NDArray[np.bool_]
    lengths: NDArray[np.int64]


class DocumentReader:
    """Reads a source's documents.

    Args:
        source: the documents.
        choice: of the spans that are moved to their ends; None: they are read as they are.
    """

    def __init__(self, source: Source, choice: SpanChoice | None = None) -> None:
        self.source = source
        self._choice = choice

    def rows(self, documents: NDArray[np.int64], epochs: NDArray[np.int64]) -> DocumentRows:
        """Tokens and trained labels of n documents, each as it is read in an epoch.

        Args:
            documents: their numbers in the source [n].
            epochs: the epoch that each is read in [n].

        Raises:
            DataError: a table is missing or damaged.
        """
        rows = self.source.rows(documents)
        return rows if self._choice is None else _longer(rows, self._numbers(self._choice, rows, documents, epochs))

    def _numbers(
        self, choice: SpanChoice, rows: DocumentRows, documents: NDArray[np.int64], epochs: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Spans of each document, int64 [D]."""
        own = self.source.own_rows(documents, rows)
        return choice.numbers(own, self.source.queries(documents), epochs, lengths=rows.lengths)

    def lengths(self, epoch: int) -> NDArray[np.integer]:
        """Tokens of each document of the source in an epoch, [D]."""
        if self._choice is None:
            return self.source.lengths
        documents = np.arange(len(self.source))
        return self.rows(documents, np.full(len(documents), epoch)).lengths

    def read(self, documents: NDArray[np.int64], epochs: NDArray[np.int64], *, vocabulary: Vocabulary) -> Documents:
        """Tokens of n documents, each as it is read in an epoch.

        Args:
            documents: their numbers in the source [n].
            epochs: the epoch that each is read in [n].
            vocabulary: id ranges of the modalities.

        Raises:
            DataError: the data is damaged.
        """
        source, rows = self.source, self.source.rows(documents)
        ids = source.read(documents, rows)
        modality = checked_modality(ids, source, documents, rows, vocabulary=vocabulary)
        trained = source.trained(documents, rows, modality)
        if self._choice is None:
            return Documents(ids, modality, trained, rows.lengths)
        numbers = self._numbers(self._choice, rows, documents, epochs)
        queries, before = source.queries(documents), rows.lengths - source.own_rows(documents, rows).lengths
        tokens = hole_tokens(vocabulary)
        # Holes are at random places, so they are never trained on as labels; the ends of their fillings are.
        no_labels = np.zeros(len(HOLES), bool)
        parts, first = [], 0
        for place, end in enumerate(np.cumsum(rows.lengths).tolist()):
            own = slice(first, end)
            query = slice(first + before[place], end)
            spans = self._spans(ids[query], modality[query], vocabulary, numbers[place], queries[place], epochs[place])
            order = rotation(end - first, [(start + before[place], stop + before[place]) for start, stop in spans])
            parts.append(
                (
                    np.append(ids[own], tokens)[order],
                    np.append(modality[own], np.zeros_like(tokens, np.int8))[order],
                    np.concatenate([trained[own], no_labels, rows.trained[place, :1]])[order],
                )
            )
            first = end
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        return Documents(columns[0], columns[1], columns[2], _longer(rows, numbers).lengths)

    def _spans(
        self,
        ids: NDArray[np.int64],
        modality: NDArray[np.int8],
        vocabulary: Vocabulary,
        number: int,
        document: int,
        epoch: int,
    ) -> list[Span]:
        """Spans of a document that are moved to its end, `number` of them."""
        if not number or self._choice is None:
            return []
        runs = token_runs(ids, modality, vocabulary)
        return self._choice.spans(runs, number=number, document=document, epoch=epoch, end=len(ids) - 1)


def _longer(rows: DocumentRows, numbers: NDArray[np.int64]) -> DocumentRows:
    """The rows of documents with so many spans: holes and ends are text, of which only the ends can be labels."""
    counts, labels = rows.counts.copy(), rows.labels.copy()
    counts[:, 0] += PER_SPAN * numbers
    labels[:, 0] += numbers * rows.trained[:, 0]
    return replace(rows, counts=counts, labels=labels)
