"""Joins pairs of duplicates into clusters, of which the first document is kept. D documents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from mmscale.data.dedup.compared_files import Compared

_CHUNK = 1 << 20  # documents or pairs that are processed together


class DuplicateForest:
    """Disjoint sets of documents, each identified by its smallest number; in a mapped file, 8 bytes a document.

    Args:
        file: created.
        documents: D.
    """

    def __init__(self, file: Path, documents: int) -> None:
        self._parent = np.memmap(file, dtype=np.int64, mode="w+", shape=(documents,))
        for start, stop in chunks(documents):
            self._parent[start:stop] = np.arange(start, stop)

    def roots(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """The smallest number of each document's set [n]."""
        found = self._parent[documents]
        while True:
            above = self._parent[found]
            if (above == found).all():
                break
            found = above
        self._parent[documents] = found
        return np.asarray(found)

    def join(self, pairs: NDArray[np.int64]) -> None:
        """Join the sets of both documents of each pair [n, 2]."""
        for start, stop in chunks(len(pairs)):
            roots = np.stack([self.roots(pairs[start:stop, side]) for side in (0, 1)])
            names, places = np.unique(roots, return_inverse=True)
            one, other = places.reshape(2, -1)
            graph = coo_array((np.ones(len(one), bool), (one, other)), shape=(len(names),) * 2)
            _, component = connected_components(graph, directed=False)
            least = np.full(component.max(initial=-1) + 1, np.iinfo(np.int64).max)
            np.minimum.at(least, component, names)
            self._parent[names] = least[component]


def chunks(count: int) -> list[tuple[int, int]]:
    """Starts and ends of consecutive ranges that cover 0..count-1."""
    return [(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]


@dataclass(frozen=True)
class DuplicateCluster:
    """Documents of which each is a duplicate of another one.

    Attributes:
        first: the smallest number; this document is kept.
        documents: number of documents.
        contents: number of different contents; equal words and codes count once.
    """

    first: int
    documents: int
    contents: int


def largest(
    forest: DuplicateForest, file: Path, documents: int, records: Compared, *, count: int
) -> tuple[int, list[DuplicateCluster]]:
    """The number of clusters with two or more documents, and the largest ones.

    Args:
        forest: of all documents.
        file: for the sizes, 8 bytes a document.
        documents: D.
        records: of the documents.
        count: number of clusters to return.
    """
    sizes = np.memmap(file, dtype=np.int64, mode="w+", shape=(documents,))
    for start, stop in chunks(documents):
        roots, own = np.unique(forest.roots(np.arange(start, stop)), return_counts=True)
        sizes[roots] += own
    number, best = 0, np.zeros(0, np.int64)
    for start, stop in chunks(documents):
        here = np.flatnonzero(sizes[start:stop] > 1) + start
        number += len(here)
        best = np.concatenate([best, here])
        best = best[np.lexsort((best, -sizes[best]))][:count]
    members: dict[int, list[NDArray[np.int64]]] = {int(root): [] for root in best}
    for start, stop in chunks(documents):
        roots = forest.roots(np.arange(start, stop))
        places = np.flatnonzero(np.isin(roots, best))
        for root in np.unique(roots[places]).tolist():
            members[root].append(start + places[roots[places] == root])
    return number, [
        DuplicateCluster(
            root, int(sizes[root]), len(np.unique(records.facts.of(np.concatenate(own))[["text", "items"]]))
        )
        for root, own in members.items()
    ]
