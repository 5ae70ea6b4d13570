"""Embeddings of documents without a model: TF-IDF of their token ids, reduced by a truncated SVD.

Each modality has its own embedding; both are normalised and averaged, as CM3Leon does with CLIP's (arXiv 2309.02591,
section 2.1).

D documents, E width of an embedding, V ids of a modality.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, vstack
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfTransformer

from mmscale.data.arrays import scattered
from mmscale.data.stream.source import Source
from mmscale.data.vocab import Vocabulary

Embeddings = NDArray[np.float32]
_READ = 4096  # documents that are read at once


def normalised(rows: NDArray[np.floating]) -> Embeddings:
    """Rows of length 1, float32; rows of zeros stay."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(length > 0.0, length, 1.0), np.float32)


@dataclass(frozen=True)
class IdCounts:
    """How often ids occur in documents.

    Attributes:
        whole: of all tokens except special ones, a matrix [D, V] for each modality.
        dropped: the same without the tokens that query dropout removes.
    """

    whole: tuple[csr_array, ...]
    dropped: tuple[csr_array, ...]


def count_tokens(source: Source, vocabulary: Vocabulary, *, dropout: float, seed: int) -> IdCounts:
    """Count the ids of all documents of a split.

    Args:
        source: the documents.
        vocabulary: ids of each modality.
        dropout: probability with which a token of a query is left out; a function of document and position.
        seed: of the dropout.
    """
    whole: list[list[csr_array]] = [[] for _ in vocabulary.ranges]
    dropped: list[list[csr_array]] = [[] for _ in vocabulary.ranges]
    for first in range(0, len(source), _READ):
        documents = np.arange(first, min(first + _READ, len(source)))
        table = source.rows(documents)
        ids, row = source.read(documents, table), np.repeat(np.arange(len(documents)), table.lengths)
        kept = _kept(documents, table.lengths, dropout=dropout, seed=seed)
        for number, (low, high) in enumerate(vocabulary.ranges):
            own = (ids >= max(low, len(vocabulary.specials))) & (ids < high)
            for found, some in ((whole, own), (dropped, own & kept)):
                ones = np.ones(int(some.sum()), np.float32)
                shape = (len(documents), high - low)
                found[number].append(csr_array((ones, (row[some], ids[some] - low)), shape=shape))
    return IdCounts(*(tuple(csr_array(vstack(parts)) for parts in found) for found in (whole, dropped)))


def _kept(documents: NDArray[np.int64], lengths: NDArray[np.int64], *, dropout: float, seed: int) -> NDArray[np.bool_]:
    """Whether dropout keeps each token, a function of the document's number, the token's place and the seed."""
    place = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    words = scattered(np.repeat(documents, lengths).astype(np.uint64) ^ np.uint64(seed << 40))
    return np.asarray((scattered(words ^ place.astype(np.uint64)) >> np.uint64(11)) >= dropout * 2.0**53)


class TokenEmbedding:
    """TF-IDF and SVD of each modality, fitted on training documents.

    Args:
        counts: of the training documents, [D, V] for each modality.
        dimensions: largest width of a modality's embedding.
        seed: of the SVD.
    """

    def __init__(self, counts: Sequence[csr_array], *, dimensions: int, seed: int) -> None:
        self._weights = [TfidfTransformer(sublinear_tf=True) for _ in counts]
        self._svd: list[TruncatedSVD | None] = []
        for weights, own in zip(self._weights, counts, strict=True):
            found = weights.fit_transform(own)
            width = min(dimensions, *(size - 1 for size in own.shape))
            reduces = width > 0 and own.nnz
            self._svd.append(TruncatedSVD(width, random_state=seed).fit(found) if reduces else None)

    def of(self, counts: Sequence[csr_array]) -> Embeddings:
        """Embeddings of documents, rows of length 1, float32 [D, E]; zeros for those without a known token."""
        parts = [
            normalised(svd.transform(weights.transform(own)))
            for svd, weights, own in zip(self._svd, self._weights, counts, strict=True)
            if svd is not None
        ]
        # Side by side: the product of two rows is the mean of the modalities' cosines, for equally many modalities.
        return normalised(np.concatenate(parts, axis=1)) if parts else np.zeros((counts[0].shape[0], 1), np.float32)
