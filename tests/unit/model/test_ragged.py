"""Pieces of documents as ragged sequences against a loop over documents and tokens."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmscale.data.stream.context_rows import zigzag
from mmscale.model.context import ContextSplit
from mmscale.model.ragged import Pieces, pieces_of


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Numbers of documents [B, S] whose lengths 2 * CP divides, and CP."""
    size = draw(st.integers(1, 4))
    rows = draw(st.integers(1, 3))
    length = 2 * size * draw(st.integers(1, 12))
    ids = []
    for _ in range(rows):
        cuts = draw(st.lists(st.integers(1, length // (2 * size)), max_size=5))
        ends = sorted({2 * size * cut for cut in cuts} | {length})
        ids.append(np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0)))
    return torch.from_numpy(np.stack(ids)), size


def _expected(ids: list[list[int]], own: list[list[int]]) -> list[tuple[list[int], list[int]]]:
    """For each piece: its positions, and the rows [position * B + sequence] of its keys."""
    found = []
    for sequence, (documents, mine) in enumerate(zip(ids, own, strict=True)):
        piece: list[int] = []
        for place in mine:
            if piece and (place != piece[-1] + 1 or documents[place] != documents[piece[-1]]):
                found.append((sequence, piece))
                piece = []
            piece.append(place)
        found.append((sequence, piece))
    rows = []
    for sequence, piece in found:
        start = ids[sequence].index(ids[sequence][piece[0]])
        rows.append((piece, [place * len(ids) + sequence for place in range(start, piece[-1] + 1)]))
    return rows


def _check(documents: torch.Tensor, split: ContextSplit) -> None:
    number = sum(len(set(row)) for row in documents.tolist())
    found: Pieces = pieces_of(documents.t().contiguous(), split, bound=2 * number + 3)
    expected = _expected(documents.tolist(), split.own.t().tolist())
    queries = [stop - start for start, stop in itertools.pairwise(found.query_ends.tolist())]
    assert queries == [len(piece) for piece, _ in expected] + [0] * (2 * number + 3 - len(expected))
    marks = found.key_ends.tolist()
    rows = [found.keys[start:stop].tolist() for start, stop in itertools.pairwise(marks)]
    assert rows == [keys for _, keys in expected] + [[]] * (len(queries) - len(expected))
    assert found.unused.tolist() == [row >= marks[-1] for row in range(len(found.keys))]


@given(batches())
def test_pieces_of_documents(batch: tuple[torch.Tensor, int]) -> None:
    documents, size = batch
    order = torch.from_numpy(zigzag(documents.numpy().astype(np.int32), size=size)).t().contiguous()
    for rank in range(size):
        _check(documents, ContextSplit(order, rank, size))


@given(batches())
def test_pieces_of_sequences_as_mixture_of_depths_layers_split_them(batch: tuple[torch.Tensor, int]) -> None:
    documents, size = batch
    whole = torch.arange(documents.shape[1]).unsqueeze(1).expand(-1, len(documents))
    length = documents.shape[1]
    for rank in range(size):
        _check(documents, ContextSplit(whole, rank, size).dealt(length))
