"""Packs token lists into a micro-batch and returns the place of every list, for scoring outside of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmscale.data.stream.micro_batch import MicroBatch
from mmscale.data.stream.packing import padded_lengths
from mmscale.data.vocab import PAD, Vocabulary


class TokenPlace(NamedTuple):
    """The place of a list of tokens in a micro-batch."""

    row: int
    start: int


def pack_rows(
    rows: Sequence[Sequence[NDArray[np.int64]]], *, vocabulary: Vocabulary, seq_length: int, multiple: int = 1
) -> tuple[MicroBatch, list[list[TokenPlace]]]:
    """One sequence per row: its documents one after another, then padding.

    Args:
        rows: documents of each row; their lengths add up to at most `seq_length`.
        vocabulary: gives modalities.
        seq_length: tokens of a sequence.
        multiple: documents are padded to a multiple of this, as with `data.document_multiple`.

    Returns:
        The micro-batch, whose labels are each document's next tokens, and the place of every document.
    """
    shape = (len(rows), seq_length)
    tokens = np.full(shape, PAD, dtype=np.int64)
    labels = np.full(shape, PAD, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.float32)
    positions = np.zeros(shape, dtype=np.int64)
    documents = np.zeros(shape, dtype=np.int32)
    places: list[list[TokenPlace]] = []
    for row, content in enumerate(rows):
        at = 0
        places.append([])
        for number, (ids, size) in enumerate(zip(content, padded_sizes(content, multiple), strict=True)):
            end = at + len(ids)
            assert end <= seq_length, f"row {row} is longer than {seq_length} tokens"
            tokens[row, at:end] = ids
            labels[row, at : end - 1] = ids[1:]
            mask[row, at : end - 1] = 1.0
            places[row].append(TokenPlace(row, at))
            begin, at = at, at + size
            positions[row, begin:at] = np.arange(at - begin)
            documents[row, begin:at] = number
        documents[row, at:] = len(content)
        positions[row, at:] = np.arange(seq_length - at)
    modality, label_modality = vocabulary.modality_of(tokens), vocabulary.modality_of(labels)
    names = range(len(vocabulary.names))
    batch = MicroBatch(
        tokens=tokens,
        labels=labels,
        loss_mask=mask,
        position_ids=positions,
        document_ids=documents,
        modality_ids=modality,
        counts=tuple(int((modality == m).sum()) for m in names),
        label_counts=tuple(int(((label_modality == m) & (mask > 0)).sum()) for m in names),
        sources=np.zeros(len(rows), dtype=np.int64),
        index=0,
    )
    return batch, places


def fill_rows(documents: Sequence[NDArray[np.int64]], *, seq_length: int, multiple: int = 1) -> list[list[int]]:
    """Numbers of the documents of each row, in order: as many per row as fit.

    Args:
        documents: ids of each.
        seq_length: tokens of a row; a longer document has a row of its own.
        multiple: each document is padded to a multiple of this number of tokens.
    """
    rows: list[list[int]] = [[]]
    left = seq_length
    for number, size in enumerate(padded_sizes(documents, multiple)):
        if size > left and rows[-1]:
            rows.append([])
            left = seq_length
        rows[-1].append(number)
        left -= size
    return rows


def padded_sizes(documents: Sequence[NDArray[np.int64]], multiple: int) -> list[int]:
    """Tokens that each document occupies if it is padded to a multiple of `multiple`."""
    sizes: list[int] = padded_lengths(np.array([len(ids) for ids in documents], dtype=np.int64), multiple).tolist()
    return sizes
