"""Token lists -> a micro-batch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmscale.data.stream.packed import fill_rows, pack_rows
from mmscale.data.vocab import PAD, Vocabulary

VOCABULARY = Vocabulary(("text", "image"), ((0, 20), (20, 40)))


def _ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_a_row_of_two_documents() -> None:
    batch, places = pack_rows([[_ids(1, 7, 25), _ids(1, 30)], []], vocabulary=VOCABULARY, seq_length=8)
    assert batch.tokens[0].tolist() == [1, 7, 25, 1, 30, PAD, PAD, PAD]
    assert batch.labels[0].tolist() == [7, 25, PAD, 30, PAD, PAD, PAD, PAD]
    assert batch.loss_mask[0].tolist() == [1, 1, 0, 1, 0, 0, 0, 0]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert batch.document_ids[0].tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert batch.modality_ids[0].tolist() == [0, 0, 1, 0, 1, -1, -1, -1]
    assert batch.modality_ids[1].tolist() == [-1] * 8
    assert (batch.counts, batch.label_counts) == ((3, 2), (1, 2))
    assert [tuple(place) for place in places[0]] == [(0, 0), (0, 3)]
    assert places[1] == []


def test_a_row_that_is_too_long_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="longer than 2"):
        pack_rows([[_ids(1, 2, 3)]], vocabulary=VOCABULARY, seq_length=2)


@given(st.lists(st.integers(1, 9), max_size=30))
def test_rows_are_filled_in_order_and_never_over(lengths: list[int]) -> None:
    rows = fill_rows([np.zeros(n, dtype=np.int64) for n in lengths], seq_length=9)
    assert [number for row in rows for number in row] == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in row) <= 9 for row in rows)
    # A row ends only because the next document would not have fitted.
    for row, following in itertools.pairwise(rows):
        assert sum(lengths[number] for number in row) + lengths[following[0]] > 9
