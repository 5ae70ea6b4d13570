"""Compares the tokens of documents with their table, from which capacities and loss weights are computed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmscale.data.stream.source import Source
from mmscale.data.stream.table import DocumentRows
from mmscale.data.vocab import Vocabulary
from mmscale.errors import DataError


def checked_modality(
    ids: NDArray[np.int64],
    source: Source,
    documents: NDArray[np.int64],
    table: DocumentRows,
    *,
    vocabulary: Vocabulary,
) -> NDArray[np.int8]:
    """Modality of each token, after comparing it with the table, from which capacities and loss weights are computed.

    Args:
        ids: of the documents, one after another, int64 [tokens].
        source: the documents' origin.
        documents: their numbers.
        table: the source's `rows` of them.
        vocabulary: gives modalities.

    Raises:
        DataError: tokens and table disagree.
    """
    starts = np.cumsum(table.lengths) - table.lengths
    try:
        modality = vocabulary.modality_of(ids)
    except DataError as error:
        raise DataError(
            f"data: {source.folder}: {error.cause}",
            remedy="the files are damaged: copy the data set again, or prepare it again",
        ) from None
    one_hot = modality[:, None] == np.arange(len(vocabulary.names))
    found = np.add.reduceat(one_hot, starts, axis=0, dtype=np.int64)
    wrong = (found != table.counts).any(axis=1) | (modality[starts] != 0)
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        document, start = int(documents[first]), int(modality[starts[first]])
        raise DataError(
            f"data: {source.where(document)} has {found[first].tolist()} tokens per modality, starting with one of "
            f"modality {start}; its table says {table.counts[first].tolist()}, starting with modality 0",
            remedy="the files are damaged: copy the data set again, or prepare it again",
        )
    return modality
