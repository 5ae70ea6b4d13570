"""The nearest training documents of each document, by exact comparison with all of them in blocks.

D training documents, Q queries, E width of an embedding, k neighbours, c candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmscale.data.prepared.neighbours import NO_NEIGHBOUR
from mmscale.data.retrieval.embed import Embeddings

_PRODUCTS = 1 << 24  # entries of the similarity matrix that are in memory at once
_CANDIDATES = 4  # for each neighbour, of which those that are like a nearer neighbour are left out


@dataclass(frozen=True, eq=False)
class Bank:
    """The documents that neighbours come from.

    Attributes:
        embeddings: rows of length 1 [D, E].
        clusters: the cluster of duplicates of each document, int64 [D].
        allowed: whether each may be a neighbour, bool [D].
        most_similar: largest cosine similarity between a document and its neighbour, and between two neighbours.
    """

    embeddings: Embeddings
    clusters: NDArray[np.int64]
    allowed: NDArray[np.bool_]
    most_similar: float


@dataclass(frozen=True, eq=False)
class Queries:
    """The documents whose neighbours are wanted.

    Attributes:
        whole: embeddings, rows of length 1 [Q, E]; they decide which documents are too similar.
        dropped: embeddings without the tokens that query dropout removes, by which documents are ranked [Q, E].
        clusters: the cluster of duplicates of each, -1: in none of the bank's, int64 [Q].
    """

    whole: Embeddings
    dropped: Embeddings
    clusters: NDArray[np.int64]


def nearest(
    queries: Queries, bank: Bank, *, columns: int, advance: Callable[[int], None]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The neighbours of each query and their similarities with the whole query.

    Args:
        queries: the documents.
        bank: the documents that neighbours come from.
        columns: k.
        advance: called with the number of queries that are done.

    Returns:
        Numbers of documents of the bank, the nearest first, then `NO_NEIGHBOUR`, int64 [Q, k]; their similarities, NaN
        where there is none, float32 [Q, k].
    """
    block = max(1, _PRODUCTS // len(bank.embeddings))
    table = np.full((len(queries.whole), columns), NO_NEIGHBOUR, np.int64)
    similarity = np.full(table.shape, np.nan, np.float32)
    for first in range(0, len(table), block):
        some = slice(first, min(first + block, len(table)))
        table[some], similarity[some] = _block(queries, bank, some, columns=columns)
        advance(some.stop)
    return table, similarity


def _block(queries: Queries, bank: Bank, some: slice, *, columns: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    whole = queries.whole[some] @ bank.embeddings.T
    score = queries.dropped[some] @ bank.embeddings.T
    # A document with nothing in common is no neighbour either.
    unfit = (whole > bank.most_similar) | (score <= 0.0) | ~bank.allowed
    unfit |= queries.clusters[some, None] == bank.clusters
    score[unfit] = -np.inf
    count = min(_CANDIDATES * columns, score.shape[1])
    found = np.argpartition(-score, count - 1, axis=1)[:, :count]
    # Ties go to the smaller number, so that the result does not depend on the blocks.
    order = np.lexsort((found, -np.take_along_axis(score, found, axis=1)), axis=1)
    found = np.take_along_axis(found, order, axis=1)
    fits = np.isfinite(np.take_along_axis(score, found, axis=1))
    kept = _differing(found, fits, bank)
    place = np.argsort(~kept, axis=1, kind="stable")[:, :columns]
    found, kept = np.take_along_axis(found, place, axis=1), np.take_along_axis(kept, place, axis=1)
    similarity = np.where(kept, np.take_along_axis(whole, found, axis=1), np.nan).astype(np.float32)
    found = np.where(kept, found, NO_NEIGHBOUR)
    missing = ((0, 0), (0, columns - found.shape[1]))
    return (
        np.pad(found, missing, constant_values=NO_NEIGHBOUR),
        np.pad(similarity, missing, constant_values=np.nan),
    )


def _differing(found: NDArray[np.int64], fits: NDArray[np.bool_], bank: Bank) -> NDArray[np.bool_]:
    """Which candidates remain if those go that are too similar to a remaining nearer one, bool [q, c]."""
    rows, clusters = bank.embeddings[found], bank.clusters[found]
    alike = np.einsum("qce,qde->qcd", rows, rows, optimize=True) > bank.most_similar
    alike |= clusters[:, :, None] == clusters[:, None, :]
    kept = fits.copy()
    for place in range(1, found.shape[1]):
        kept[:, place] &= ~(alike[:, place, :place] & kept[:, :place]).any(axis=1)
    return kept
