"""Documents that are read together with their neighbours: retrieved documents first, then the document itself.

A composite is packed, attended to and padded as one document (RA-CM3, arXiv 2211.12561; CM3Leon, arXiv 2309.02591,
section 2.1). Its number is `document + D * code`, where the digits of `code` name columns of the table of neighbours.
So its length and its tokens follow from its number alone, and everything behind packing needs no epoch.

D documents, k columns of the table, K modalities, n requested documents.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mmscale.config import Config
from mmscale.data.arrays import scattered
from mmscale.data.prepared.identity import identity_of, retrieval_of, selection_of
from mmscale.data.prepared.manifest import TRAIN, read_manifest
from mmscale.data.prepared.neighbours import NO_NEIGHBOUR, check_numbers, open_table, table_of
from mmscale.data.stream.packing import Purpose, random_bits
from mmscale.data.stream.source import Source
from mmscale.data.stream.table import DocumentRows
from mmscale.data.vocab import Vocabulary

_SPARE = 4  # random candidates for each random neighbour, some of which may be excluded


class Neighbours(Protocol):
    """The candidates for the neighbours of each document."""

    @property
    def width(self) -> int:
        """Number of candidates of a document (k)."""

    def of(self, documents: NDArray[np.integer]) -> NDArray[np.int64]:
        """Numbers of training documents, the preferred first, `NO_NEIGHBOUR` where there is none, int64 [n, k]."""


class StoredNeighbours:
    """Neighbours from a table of `mmscale data retrieve`.

    Args:
        queries: the documents that have neighbours.
        key: of the table.
        bank: number of training documents.

    Raises:
        DataError: the table is missing or damaged.
    """

    def __init__(self, queries: Source, key: str, *, bank: int) -> None:
        self._folder, self._split, self._key, self._bank = queries.folder, queries.split, key, bank
        self._documents = len(queries)
        self._table = self._open()
        self.width = self._table.shape[1]

    def _open(self) -> NDArray[np.int64]:
        return open_table(self._folder, self._split, self._key, documents=self._documents)

    def __getstate__(self) -> dict[str, Any]:
        """All attributes except the map, for worker processes that do not fork."""
        return {**self.__dict__, "_table": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._table = self._open()

    def of(self, documents: NDArray[np.integer]) -> NDArray[np.int64]:
        """Rows of the table, int64 [n, k]."""
        found = self._table[documents]
        check_numbers(found, bank=self._bank, folder=self._folder)
        return found


@dataclass(frozen=True)
class RandomNeighbours:
    """Random training documents, a function of the document's number: a control that no retrieval should resemble.

    Attributes:
        width: k.
        bank: number of training documents.
        own: whether the documents are training documents themselves, which are not their own neighbours.
    """

    width: int
    bank: int
    own: bool

    def of(self, documents: NDArray[np.integer]) -> NDArray[np.int64]:
        """Random numbers, int64 [n, k]."""
        words = scattered(documents.astype(np.uint64))[:, None] ^ np.arange(self.width, dtype=np.uint64)
        found = (scattered(words) % np.uint64(self.bank)).astype(np.int64)
        if self.own:
            found[found == documents[:, None]] = NO_NEIGHBOUR
        return found


@dataclass(frozen=True)
class NeighbourUse:
    """How documents are read with neighbours.

    Attributes:
        most: neighbours of a document, at most.
        sampled: draw number and neighbours in each epoch; otherwise the first ones are taken.
        loss: whether their tokens are trained on.
    """

    most: int
    sampled: bool
    loss: bool


@dataclass(frozen=True, eq=False)
class _Members:
    """The documents of some composites, one after another.

    Attributes:
        documents: their numbers, int64 [m].
        own: whether each is the query, not a neighbour, bool [m].
        starts: the first one of each composite, int64 [n].
    """

    documents: NDArray[np.int64]
    own: NDArray[np.bool_]
    starts: NDArray[np.int64]


class ComposedSource(Source):
    """A source whose documents are read with neighbours. `len`, `lengths` and `of_epoch` are those of its documents.

    Args:
        plain: the documents without neighbours.
        bank: the training documents that neighbours come from; those that its weights exclude are no neighbours.
        neighbours: candidates.
        use: how many are read, and how.
        name: identifies the neighbours.

    Attributes:
        plain: as given.
    """

    def __init__(self, plain: Source, *, bank: Source, neighbours: Neighbours, use: NeighbourUse, name: str) -> None:
        vars(self).update(vars(plain))
        self._open = OrderedDict()
        self.plain = plain
        self.identity = f"{plain.identity}|{name}|{bank.identity}"
        self._bank, self._neighbours, self._use = bank, neighbours, use
        self._base = neighbours.width + 1  # digit 0: no neighbour
        assert len(plain) * self._base**use.most < 1 << 63, "numbers of composites have 63 bits"

    @property
    def composes(self) -> bool:
        """Documents are read together with neighbours."""
        return True

    def queries(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The documents of composites, int64 [n]."""
        return numbers % len(self)

    def own_rows(self, numbers: NDArray[np.int64], rows: DocumentRows) -> DocumentRows:
        """Rows of the queries alone."""
        return self.plain.rows(self.queries(numbers))

    def composed(
        self, documents: NDArray[np.int64], *, epoch: int, seed: int, position: int, seq_length: int
    ) -> NDArray[np.int64]:
        """Numbers of the composites that an epoch reads, int64 [n]: a pure function of the arguments.

        Args:
            documents: their queries.
            epoch: number of the epoch.
            seed: the run's.
            position: of the source in the blend.
            seq_length: tokens of a sequence; neighbours that would not fit are left out.
        """
        candidates = self._candidates(documents)
        if self._use.sampled:
            keys = random_bits(self._base, seed=seed, source=position, purpose=Purpose.NEIGHBOURS, number=epoch)
            words = scattered(scattered(documents.astype(np.uint64))[:, None] ^ keys)
            wanted = (words[:, -1] % np.uint64(self._use.most + 1)).astype(np.int64)
            priority = words[:, :-1] >> np.uint64(1)
        else:
            wanted = np.full(len(documents), self._use.most)
            priority = np.tile(np.arange(self._neighbours.width, dtype=np.uint64), (len(documents), 1))
        priority[candidates == NO_NEIGHBOUR] = np.iinfo(np.uint64).max
        columns = np.argsort(priority, axis=1, kind="stable")[:, : self._use.most]
        chosen = np.take_along_axis(candidates, columns, axis=1)
        chosen[np.arange(chosen.shape[1]) >= wanted[:, None]] = NO_NEIGHBOUR
        lengths = np.zeros(chosen.shape, np.int64)
        lengths[chosen != NO_NEIGHBOUR] = self._bank.rows(chosen[chosen != NO_NEIGHBOUR]).lengths
        room = seq_length - super().rows(documents).lengths
        code = np.zeros(len(documents), np.int64)
        for slot in range(chosen.shape[1]):
            taken = (chosen[:, slot] != NO_NEIGHBOUR) & (lengths[:, slot] <= room)
            room -= np.where(taken, lengths[:, slot], 0)
            code += np.where(taken, columns[:, slot] + 1, 0) * self._base**slot
        return np.asarray(documents + code * len(self))

    def rows(self, documents: NDArray[np.integer]) -> DocumentRows:
        """Lengths, modalities and labels of composites; `bits` and `masked` are those of their queries."""
        members = self._members(documents)
        found = self._rows(members)
        # A composite has at most seq_length tokens.
        counts, labels = (
            np.add.reduceat(table, members.starts, axis=0, dtype=np.int32) if len(table) else table
            for table in (found.counts, found.labels)
        )
        return DocumentRows(counts, found.bits[members.own], labels, found.masked[members.own])

    def read(self, documents: NDArray[np.integer], table: DocumentRows | None = None) -> NDArray[np.int64]:
        """Token ids of composites one after another, int64 [sum of their lengths]."""
        members = self._members(documents)
        of_query = np.repeat(members.own, self._rows(members).lengths)
        out = np.empty(len(of_query), np.int64)
        own = members.documents[members.own]
        out[of_query] = super().read(own, super().rows(own))
        out[~of_query] = self._bank.read(members.documents[~members.own])
        return out

    def trained(
        self, documents: NDArray[np.integer], table: DocumentRows, modality: NDArray[np.int8]
    ) -> NDArray[np.bool_]:
        """Whether each token of composites is trained on as a label, bool [sum of their lengths]."""
        members = self._members(documents)
        of_query = np.repeat(members.own, self._rows(members).lengths)
        found = np.zeros(len(of_query), bool)
        own, others = members.documents[members.own], members.documents[~members.own]
        found[of_query] = super().trained(own, super().rows(own), modality[of_query])
        if self._use.loss and len(others):
            found[~of_query] = self._bank.trained(others, self._bank.rows(others), modality[~of_query])
        return found

    def where(self, document: int) -> str:
        """A composite's place, for messages."""
        return super().where(document % len(self))

    def _candidates(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Possible neighbours [n, k] without those that are not trained on."""
        found = np.array(self._neighbours.of(documents))
        selection = self._bank.selection
        if selection is not None:
            given = found != NO_NEIGHBOUR
            given[given] = selection.weights(found[given]) > 0.0
            found[~given] = NO_NEIGHBOUR
        return found

    def _members(self, numbers: NDArray[np.integer]) -> _Members:
        """The neighbours and the query of each composite."""
        queries, code = numbers % len(self), numbers // len(self)
        content = np.full((len(numbers), self._use.most + 1), NO_NEIGHBOUR, np.int64)
        content[:, -1] = queries
        some = np.flatnonzero(code)
        if len(some):
            candidates, left = self._neighbours.of(queries[some]), code[some]
            for slot in range(self._use.most):
                left, digit = np.divmod(left, self._base)
                named = np.take_along_axis(candidates, np.maximum(digit - 1, 0)[:, None], axis=1)[:, 0]
                content[some, slot] = np.where(digit > 0, named, NO_NEIGHBOUR)
        row, column = np.nonzero(content != NO_NEIGHBOUR)
        starts = np.searchsorted(row, np.arange(len(numbers)))
        return _Members(content[row, column], column == self._use.most, starts)

    def _rows(self, members: _Members) -> DocumentRows:
        """Rows of the single documents; neighbours without loss have no labels."""
        own, others = super().rows(members.documents[members.own]), self._bank.rows(members.documents[~members.own])
        found = []
        for name in ("counts", "bits", "labels", "masked"):
            mine, theirs = getattr(own, name), getattr(others, name)
            both = np.empty((len(members.own), *mine.shape[1:]), mine.dtype)
            both[members.own], both[~members.own] = mine, theirs
            found.append(both)
        if not self._use.loss:
            found[2][~members.own] = 0
        return DocumentRows(*found)


def read_as(source: Source, selection: str, retrieval: str) -> Source:
    """The same training documents with other weights and neighbours.

    Args:
        source: the documents.
        selection: names the weights, as `SelectionFile.identity`; empty: none.
        retrieval: names the neighbours, as `retrieval_of`; empty: none. Their loss does not matter for the order.

    Raises:
        DataError: weights or neighbours are gone or damaged.
    """
    plain = (source.plain if isinstance(source, ComposedSource) else source).under(selection)
    return _with_neighbours(plain, retrieval, loss=True) if retrieval else plain


def _with_neighbours(plain: Source, retrieval: str, *, loss: bool) -> ComposedSource:
    most, _, key = retrieval.partition("-")
    use = NeighbourUse(int(most), sampled=True, loss=loss)
    return ComposedSource(
        plain, bank=plain, neighbours=StoredNeighbours(plain, key, bank=len(plain)), use=use, name=retrieval
    )


def open_source(config: Config, folder: Path, split: str, *, vocabulary: Vocabulary, weighted: bool) -> Source:
    """A data set of a configuration.

    Args:
        config: says whether weights of documents are applied, and how many neighbours documents are read with.
        folder: the data set.
        split: name of the split.
        vocabulary: the configuration's.
        weighted: whether it is used for training; an evaluation reads each document once.

    Raises:
        DataError: it is missing or damaged, has no neighbours, or its weights or neighbours were made for other
            documents.
    """
    manifest = read_manifest(folder)
    if not weighted:
        return _evaluated(config, Source(folder, split=split, vocabulary=vocabulary), vocabulary)
    plain = Source(folder, split=split, vocabulary=vocabulary, selection=selection_of(config, folder, manifest))
    retrieval = retrieval_of(config, folder, manifest)
    return _with_neighbours(plain, retrieval, loss=config.data.retrieval.loss) if retrieval else plain


def _evaluated(config: Config, plain: Source, vocabulary: Vocabulary) -> Source:
    """Documents with the neighbours of an evaluation: the nearest or random ones of the training documents."""
    settings = config.data.retrieval
    if not settings.evaluation:
        return plain
    folder, manifest = plain.folder, read_manifest(plain.folder)
    bank = Source(folder, split=TRAIN, vocabulary=vocabulary, selection=selection_of(config, folder, manifest))
    neighbours: Neighbours
    if isinstance(settings.evaluation, int):
        most, name = settings.evaluation, table_of(folder, plain.split, of=identity_of(folder, manifest)).key
        neighbours = StoredNeighbours(plain, name, bank=len(bank))
    else:
        most, name = max(1, settings.neighbours), settings.evaluation
        neighbours = RandomNeighbours(_SPARE * most, len(bank), own=plain.split == TRAIN)
    use = NeighbourUse(most, sampled=False, loss=False)
    return ComposedSource(plain, bank=bank, neighbours=neighbours, use=use, name=f"first-{most}-{name}")
