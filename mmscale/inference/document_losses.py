"""Losses of single documents under a run's checkpoint: sums over their tokens, by modality.

As in training, a document's first token is not predicted, and labels of modalities that the document does not train on
are not counted. A document that is longer than a sequence is read in pieces that overlap by one token, so that each
token is predicted once, from the earlier tokens of its piece.

n documents, K modalities, S tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mmscale.data.stream.answer_requests import WantedTokens
from mmscale.data.stream.packed import fill_rows, pack_rows
from mmscale.inference.model import RunModel, stepper_of
from mmscale.tables.routings import Routing
from mmscale.train.steps.batch import to_device

LOSS, LIKELIEST, LABELS = range(3)  # the last axis of the sums


def document_sums(
    model: RunModel, documents: Sequence[NDArray[np.int64]], trained: NDArray[np.bool_], *, routing: Routing
) -> NDArray[np.float64]:
    """Sums over the labels of each document, float64 [n, K, 3].

    The last axis: cross entropy [nats], labels that are the most likely token in their place, and labels.

    Args:
        model: a loaded checkpoint.
        documents: ids of each.
        trained: whether labels of a modality are trained on [n, K].
        routing: mode by which experts are assigned to tokens. Under batch routing the result depends on the documents
            that share a sequence.

    Raises:
        UsageError: the checkpoint does not support that routing.
    """
    model.require(routing)
    length, size = model.config.model.seq_length, model.config.train.micro_batch_size
    cut = cut_documents(documents, length)
    pieces, owners = [piece for _, piece in cut], np.array([number for number, _ in cut], np.int64)
    rows, stepper = fill_rows(pieces, seq_length=length) if pieces else [], stepper_of(model)
    sums = np.zeros((*trained.shape, 3))
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        whole = [part[place % len(part)] for place in range(size)]  # each micro-batch has the same number of rows
        batch, _ = pack_rows(
            [[pieces[number] for number in row] for row in whole], vocabulary=model.vocabulary, seq_length=length
        )
        row, position = np.nonzero(batch.loss_mask[: len(part)] > 0)
        firsts = np.cumsum([0, *(len(one) for one in part)])
        flat = np.concatenate([np.asarray(one, np.int64) for one in part])
        document = owners[flat[firsts[row] + batch.document_ids[row, position]]]
        tokens = batch.labels[row, position]
        modality = model.vocabulary.modality_of(tokens).astype(np.int64)
        used = trained[document, modality]
        row, position, document, tokens, modality = (one[used] for one in (row, position, document, tokens, modality))
        if not len(tokens):
            continue
        wanted = WantedTokens(row, position, np.arange(len(tokens)), tokens, document)
        (found,) = stepper.pick([to_device(batch, model.vocabulary, routing=routing)], [wanted])
        log_p, likeliest = found.double().cpu().numpy().T
        values = np.stack([-log_p, likeliest, np.ones(len(tokens))], axis=1)
        np.add.at(sums, (document, modality), values)
    return sums


def cut_documents(documents: Sequence[NDArray[np.int64]], length: int) -> list[tuple[int, NDArray[np.int64]]]:
    """Pieces of at most `length` tokens, int64 [tokens], each with the number of its document."""
    return [(number, piece) for number, ids in enumerate(documents) for piece in _pieces(ids, length)]


def _pieces(ids: NDArray[np.int64], length: int) -> list[NDArray[np.int64]]:
    """Parts of at most `length` tokens; each begins with the last token of the one before."""
    return [ids[start : start + length] for start in range(0, max(1, len(ids) - 1), length - 1)]
