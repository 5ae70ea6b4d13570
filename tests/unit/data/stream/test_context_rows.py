"""Which tokens context-parallel ranks get: every document in equal and equally expensive parts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mmscale.data.stream.context_rows import ContextRows, zigzag
from mmscale.errors import DataError


def _documents(pieces: list[int], size: int) -> NDArray[np.int32]:
    """Numbers of the documents of one sequence, which are so many times 2 * size tokens long."""
    return np.repeat(np.arange(len(pieces), dtype=np.int32), np.array(pieces) * 2 * size)


@settings(deadline=None)
@given(st.sampled_from([1, 2, 3, 4, 8]), st.lists(st.integers(1, 5), min_size=1, max_size=6), st.booleans())
def test_ranks_share_every_document_and_its_attention_equally(size: int, pieces: list[int], swapped: bool) -> None:
    first = _documents(pieces, size)
    second = _documents(pieces[::-1] if swapped else [sum(pieces)], size)
    ids = np.stack([first, second])
    rows = [ContextRows(zigzag(ids, size=size), rank, size).own for rank in range(size)]
    assert np.array_equal(np.sort(np.concatenate(rows, axis=1), axis=1), np.tile(np.arange(ids.shape[1]), (2, 1)))
    for sequence, numbers in enumerate(ids):
        starts = np.flatnonzero(np.diff(numbers, prepend=-1))
        seen = np.arange(len(numbers)) - starts[numbers] + 1  # tokens that a token attends to
        for number in np.unique(numbers):
            parts = [own[sequence][numbers[own[sequence]] == number] for own in rows]
            assert len({len(part) for part in parts}) == 1
            assert len({int(seen[part].sum()) for part in parts}) == 1
        assert all((np.diff(own[sequence]) > 0).all() for own in rows)


def test_two_ranks_of_one_document() -> None:
    order = zigzag(np.zeros((1, 8), np.int32), size=2)
    assert order.tolist() == [[0, 1, 6, 7, 2, 3, 4, 5]]


def test_a_document_that_cannot_be_shared_is_named() -> None:
    ids = np.array([[0] * 8, [0] * 2 + [1] * 6], np.int32)
    with pytest.raises(DataError, match=r"document at token 0 of sequence 1 has 2 tokens, which 2 context-parallel"):
        zigzag(ids, size=2)
