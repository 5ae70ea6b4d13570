"""The per-document tables of a split: modalities, lengths and loss masks of requested documents.

Tables of small splits are read and checked as a whole. Those of large ones stay in mapped files, which the processes of
a node share in the page cache; only requested rows are read and checked. K modalities.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.data.prepared import table_facts
from mmscale.data.prepared.label_masks import label_counts, map_label_counts
from mmscale.data.prepared.manifest import Part, checked_table, map_table, refuse_damaged

_MAPS = 128  # largest number of parts with open maps; each needs a file descriptor or two


@dataclass(frozen=True, eq=False)
class DocumentRows:
    """Rows of a table.

    Attributes:
        counts: tokens per modality of each document, int32 [n, K].
        bits: loss masks: bit m set, labels of modality m are trained on, int64 [n].
        labels: labels per modality that are trained on, int32 [n, K]; a label is the next token of the same document.
        masked: whether a bit of each token says so (conversations), bool [n].
    """

    counts: NDArray[np.int32]
    bits: NDArray[np.int64]
    labels: NDArray[np.int32]
    masked: NDArray[np.bool_]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, int64 [n]."""
        return self.counts.sum(axis=1, dtype=np.int64)

    @cached_property
    def trained(self) -> NDArray[np.bool_]:
        """Whether labels of a modality are trained on, bool [n, K]."""
        return (self.bits[:, None] >> np.arange(self.counts.shape[1])) & 1 == 1


class DocumentTable:
    """The tables of a split's parts, as one.

    Args:
        folder: the data set's folder.
        parts: those of the split that have documents.
        modalities: names of the modalities.

    Attributes:
        whole: whether it was read and checked as a whole.

    Raises:
        DataError: a table of a small split is missing or damaged.
    """

    def __init__(self, folder: Path, parts: Sequence[Part], modalities: tuple[str, ...]) -> None:
        self._folder, self._parts, self._modalities = folder, tuple(parts), modalities
        self._ends = np.cumsum([part.documents for part in parts])
        self.whole = int(self._ends[-1]) <= table_facts.LARGE
        self._rows: DocumentRows | None = None
        if self.whole:
            tables = [checked_table(folder, part, modalities) for part in parts]
            labels = [_labels(folder, part, table) for part, table in zip(parts, tables, strict=True)]
            masked = np.repeat([part.masked for part in parts], [part.documents for part in parts])
            self._rows = _rows(np.concatenate(tables), np.concatenate(labels), masked)
        self._maps: OrderedDict[int, tuple[NDArray[Any], NDArray[Any] | None]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """All attributes except the maps, for worker processes that do not fork."""
        return {**self.__dict__, "_maps": OrderedDict()}

    def rows(self, documents: NDArray[np.integer]) -> DocumentRows:
        """Rows of n documents, in the given order.

        Args:
            documents: numbers in the split [n], in any order.

        Raises:
            DataError: a table is missing or damaged.
        """
        if self._rows is not None:
            whole = self._rows
            return DocumentRows(
                whole.counts[documents], whole.bits[documents], whole.labels[documents], whole.masked[documents]
            )
        table = np.empty((len(documents), len(self._modalities) + 1), np.int64)
        labels = np.empty((len(documents), len(self._modalities)), np.int64)
        part_of = np.searchsorted(self._ends, documents, side="right")
        by_part = np.argsort(part_of, kind="stable")
        numbers, firsts = np.unique(part_of[by_part], return_index=True)
        for number, chosen in zip(numbers.tolist(), np.split(by_part, firsts[1:]), strict=True):
            start = int(self._ends[number]) - self._parts[number].documents
            own, listed = self._map(number)
            places = documents[chosen] - start
            table[chosen] = own[places]
            labels[chosen] = label_counts(own[places], None if listed is None else listed[places])
            refuse_damaged(table[chosen], self._folder, self._parts[number], self._modalities)
        masked = np.array([part.masked for part in self._parts])[part_of]
        return _rows(table, labels, masked)

    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each document of the split, int32 [D]."""
        if self._rows is not None:
            return self._rows.counts.sum(axis=1, dtype=np.int32)
        tables = (checked_table(self._folder, part, self._modalities) for part in self._parts)
        return np.concatenate([table[:, :-1].sum(axis=1, dtype=np.int32) for table in tables])

    def _map(self, number: int) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """A part's table and label counts, mapped; closes those that were opened first if too many are open."""
        if number not in self._maps:
            if len(self._maps) >= _MAPS:
                self._maps.popitem(last=False)
            part = self._parts[number]
            listed = map_label_counts(self._folder, part) if part.masked else None
            self._maps[number] = map_table(self._folder, part), listed
        return self._maps[number]


def _labels(folder: Path, part: Part, table: NDArray[Any]) -> NDArray[np.int64]:
    return label_counts(table, map_label_counts(folder, part) if part.masked else None)


def _rows(table: NDArray[Any], labels: NDArray[np.int64], masked: NDArray[np.bool_]) -> DocumentRows:
    return DocumentRows(table[:, :-1].astype(np.int32), table[:, -1].astype(np.int64), labels.astype(np.int32), masked)
