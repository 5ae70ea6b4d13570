"""What a micro-batch is checked for on its way to the device, and what the host knows of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mmscale.data.stream.micro_batch import MicroBatch
from mmscale.data.stream.packed import pack_rows
from mmscale.data.vocab import Vocabulary
from mmscale.errors import DataError
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
