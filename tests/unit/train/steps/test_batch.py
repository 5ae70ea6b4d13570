"""What a micro-batch is checked for on its way to the device, and what the host knows of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mmscale.data.stream.context_rows import ContextRows, zigzag
from mmscale.data.stream.micro_batch import MicroBatch
from mmscale.data.stream.packed import pack_rows
from mmscale.data.vocab import Vocabulary
from mmscale.errors import DataError
from mmscale.model.untied import rows_of
from mmscale.train.steps.batch import counts_of, to_device

VOCABULARY = Vocabulary(("text", "image"), ((0, 20), (20, 31)))


def micro_batch(*rows: list[int]) -> MicroBatch:
    return pack_rows([[np.array(row)] for row in rows], vocabulary=VOCABULARY, seq_length=6)[0]


def test_counts_are_those_of_the_sequences() -> None:
    counts = to_device(micro_batch([5, 20, 30], [7, 8, 9, 10]), VOCABULARY).params.counts
    assert counts is not None
    assert counts.own.tolist() == [[1, 2], [4, 0]] and counts.everyone.tolist() == [[[1, 2], [4, 0]]]


@pytest.mark.parametrize("token", [31, 1000, -1])
def test_an_id_outside_all_modalities_is_an_error_where_it_enters(token: int) -> None:
    with pytest.raises(
        DataError, match=f"token id {token} belongs to no modality of vocab.modalities, whose ids are 0"
    ):
        micro_batch([5, token])


@pytest.mark.parametrize("modality", [2, -2])
def test_a_token_of_no_modality_is_an_error_before_it_reaches_a_layer(modality: int) -> None:
    batch = micro_batch([5, 20, 30], [7, 8, 9, 10])
    wrong = batch.modality_ids.copy()
    wrong[1, 2] = modality
    with pytest.raises(DataError, match=f"token 2 of sequence 1 has modality {modality}; there are modalities 0 to 1"):
        to_device(replace(batch, modality_ids=wrong), VOCABULARY)


def test_counts_of_the_ranks_beside_it_include_its_own() -> None:
    batch = micro_batch([5, 20, 30])
    counts = counts_of(replace(batch, everyone=np.array([[[6, 0]], [[1, 2]]])), modalities=2)
    assert counts.own.tolist() == [[1, 2]] and counts.everyone.shape == (2, 1, 2)
    with pytest.raises(AssertionError):
        counts_of(replace(batch, everyone=np.array([[[6, 0]], [[2, 1]]])), modalities=2)


@pytest.mark.parametrize("size", [1, 2])
def test_the_host_knows_how_many_rows_each_modality_has(size: int) -> None:
    """Of this context-parallel rank's tokens, padding in the last modality; the device counts the same."""
    documents = [[5, 20, 30, 21], [7, 8, 9, 22, 23, 24, 25, 26], [3, 3, 3, 3]]
    rows = [[np.array(one) for one in documents[:2]], [np.array(documents[2])]]
    (batch,) = pack_rows(rows, vocabulary=VOCABULARY, seq_length=12)[:1]
    whole = np.zeros(2, dtype=np.int64)
    for rank in range(size):
        context = None if size == 1 else ContextRows(zigzag(batch.document_ids, size=size), rank, size)
        params = to_device(replace(batch, context=context), VOCABULARY).params
        assert params.counts is not None
        known, counted = rows_of(params, 2).counts, rows_of(replace(params, counts=None, _cache={}), 2).counts
        assert known == counted and sum(known or ()) == batch.tokens.size // size
        whole += np.array(known)
        assert params.counts.kept(4, None).rows(4 * len(rows)) is None
    padding = batch.tokens.size - sum(map(len, documents))
    assert whole.tolist() == [8, 8 + padding]
