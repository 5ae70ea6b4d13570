"""Causal masking of a document's tokens (CM3, arXiv 2201.07520): spans become holes, and move to the document's end.

    a b c d e   ->   a <mask:0> c <mask:1> e   <mask:0> b <eom>   <mask:1> d <eom>

Training rotates documents (stream/causal_masking.py chooses the spans), generation fills holes. Ids only; no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mmscale.data.vocab import END_OF_FILL, HOLES, Vocabulary

Span = tuple[int, int]  # half-open
PER_SPAN = 3  # tokens that a span adds: its hole twice, and the end of its filling
MEAN_SPANS = 1.0 + math.exp(-1.0)  # of a document that has room for them: the mean of Poisson(1), of at least 1


def hole_tokens(vocabulary: Vocabulary) -> NDArray[np.int64]:
    """Ids of the holes in their order, then of the end of a filling.

    Raises:
        ConfigError: the vocabulary does not have them.
    """
    return np.array([vocabulary.reserved_id(token) for token in (*HOLES, END_OF_FILL)])


def rotation(length: int, spans: Sequence[Span]) -> NDArray[np.int64]:
    """The order in which a document is read, int64 [length + 3 spans].

    Args:
        length: tokens of the document.
        spans: half-open, ascending, without overlap; at most as many as there are holes.

    Returns:
        Places in the document followed by the 17 tokens of `hole_tokens`: `length` + i is hole i.
    """
    places, before, end_of_fill = np.arange(length), 0, [length + len(HOLES)]
    kept: list[NDArray[np.int64] | list[int]] = []
    moved: list[NDArray[np.int64] | list[int]] = []
    for number, (start, stop) in enumerate(spans):
        hole = [length + number]
        kept += [places[before:start], hole]
        moved += [hole, places[start:stop], end_of_fill]
        before = stop
    return np.concatenate([*kept, places[before:], *moved]).astype(np.int64)
