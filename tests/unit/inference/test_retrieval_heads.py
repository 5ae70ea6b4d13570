"""Attention of a head to a token, against loops, and the choice of heads."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mmscale.config import Config
from mmscale.data.vocab import Vocabulary
from mmscale.inference.retrieval_heads import _attention_to, best_heads, make_probe
from tests.unit.data.samples import config

TOKENS, ROWS, HEADS, GROUPS, WIDTH = 9, 2, 4, 2, 3


def slow_attention(query: Any, key: Any, params: Any, at: Any, to: Any, scale: float) -> list[float]:
    """Softmax over the tokens of the layer that are in the first document and not later, one head at a time."""
    found = [0.0] * HEADS
    for row in range(ROWS):
        present = {
            int(params.position_ids[place, row]): place
            for place in range(query.shape[0])
            if int(params.document_ids[place, row]) == 0
        }
        for one, other in zip(at[row].tolist(), to[row].tolist(), strict=True):
            if one not in present or other not in present:
                continue
            for head in range(HEADS):
                group = head // (HEADS // GROUPS)
                scores = {
                    position: math.exp(scale * float(query[present[one], row, head] @ key[place, row, group]))
                    for position, place in present.items()
                    if position <= one
                }
                found[head] += scores[other] / sum(scores.values())
    return found


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("depth", [False, True])
def test_attention_is_that_of_loops(scale: float | None, depth: bool) -> None:
    """Also of a Mixture-of-Depths layer that has only some of the tokens, padded with those of no document."""
    random = torch.Generator().manual_seed(0)
    positions = torch.arange(TOKENS)[:, None].repeat(1, ROWS)
    documents = torch.zeros_like(positions)
    documents[7:] = 1  # padding, whose positions begin again
    positions[7:] = torch.arange(2)[:, None]
    if depth:
        chosen = torch.tensor([[0, 1, 2, 4, 6, 8], [1, 3, 4, 5, 6, 7]]).t()
        positions, documents = positions.gather(0, chosen), documents.gather(0, chosen)
    size = len(positions)
    query = torch.randn(size, ROWS, HEADS, WIDTH, generator=random)
    key = torch.randn(size, ROWS, GROUPS, WIDTH, generator=random)
    params = SimpleNamespace(position_ids=positions, document_ids=documents)
    at, to = torch.tensor([[4, 6, 5], [3, 6, 2]]), torch.tensor([[1, 2, 0], [1, 3, 2]])
    found = _attention_to(query, key, params, at, to, scale=scale)
    wanted = slow_attention(query, key, params, at, to, WIDTH**-0.5 if scale is None else scale)
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)


def test_the_best_heads() -> None:
    scores = np.array([[0.1, 0.5, 0.2], [0.9, 0.5, 0.0]])
    assert best_heads(scores, share=0.05) == [(1, 0)]
    assert best_heads(scores, share=0.34) == [(0, 1), (1, 0)], "of equal ones the first"
    assert best_heads(scores, share=1.0) == [(layer, head) for layer in range(2) for head in range(3)]


@pytest.mark.parametrize("length", [33, 40, 600])
def test_each_asked_token_stands_where_the_probe_says(length: int) -> None:
    given: Config = config()
    given = given.model_copy(update={"model": given.model.model_copy(update={"seq_length": length})})
    model: Any = SimpleNamespace(config=given, vocabulary=Vocabulary.from_config(given.vocab))
    probe = make_probe(model)
    assert len(probe.rows) >= 32 and probe.rows.shape[1] <= length
    rows = np.arange(len(probe.rows))[:, None]
    np.testing.assert_array_equal(probe.rows[rows, probe.query + 1], probe.rows[rows, probe.source])
    first = probe.query[:, ::4]  # the place of a key's last token, before its value
    for back in range(4):
        np.testing.assert_array_equal(probe.rows[rows, first - back], probe.rows[rows, probe.source[:, ::4] - 1 - back])
    assert (probe.source < probe.query).all()
    assert probe.rows[:, 1:].min() >= 5 and probe.rows.max() < 300
