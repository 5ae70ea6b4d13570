"""Arithmetic of a blend: which source each sequence of the blended stream comes from. S sources."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def blend(weights: NDArray[np.float64], *, start: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which source the blended sequences start..start+count-1 come from, and their number inside that source.

    Sequence n of a source with weight w (weights add up to 1) is due at (n + 1/2) / w, and the stream takes sequences
    in the order in which they are due, i.e. always from the source that lags most behind its weight. mcore's
    build_blending_indices has the same goal, but here any stretch of the stream can be computed without the sequences
    before it. With S sources, after i sequences a source has contributed w*i of them within 1/2 + w*S/2.

    Args:
        weights: share of each source, adding up to 1; a source with share 0 contributes nothing [S].
        start: first sequence of the stretch.
        count: length of the stretch.

    Returns:
        Source and number of each sequence, int64 [count] each.
    """
    if not weights.all():
        given = np.flatnonzero(weights)
        chosen, places = blend(weights[given], start=start, count=count)
        return given[chosen], places
    if len(weights) == 1:
        return np.zeros(count, np.int64), np.arange(start, start + count)
    _, due, skip = _due(weights, start=start, count=count)
    return due[0, skip : skip + count], due[1, skip : skip + count]


def blended(weights: NDArray[np.float64], *, count: int) -> NDArray[np.int64]:
    """How many of the first `count` blended sequences belong to each source, int64 [S]."""
    if not weights.all():
        found = np.zeros(len(weights), np.int64)
        found[weights > 0] = blended(weights[weights > 0], count=count)
        return found
    if len(weights) == 1:
        return np.array([count])
    before, due, skip = _due(weights, start=count, count=0)
    return before + np.bincount(due[0, :skip], minlength=len(weights))


def _due(weights: NDArray[np.float64], *, start: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """The blended stream, starting slightly before `start`.

    Returns:
        Number of sequences of each source before that point [S]; source and number of each sequence from there on, in
        their order [2, at least skip + count]; `skip`, how many of these come before `start`.
    """
    sources = len(weights)

    def due(source: int, number: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.asarray((number + 0.5) / weights[source], np.float64)

    earlier = max(0, start - sources)  # a time at which at most `start` sequences were due
    before = np.zeros(sources, np.int64)
    candidates = []
    for source in range(sources):
        # Sequences of this source that were due by then: the estimate w * t + 1/2, corrected by comparing the exact
        # times of the sequences near it (floating-point rounding).
        guess = int(earlier * weights[source] + 0.5)
        near = np.arange(max(0, guess - 2), guess + 3)
        before[source] = near[0] + int((due(source, near) <= earlier).sum()) if start else 0
    skip = start - int(before.sum())
    for source in range(sources):
        enough = int(np.ceil((skip + count + sources) * weights[source])) + 1
        number = before[source] + np.arange(enough)
        candidates.append(np.stack([np.full(enough, source), number]))
    merged = np.concatenate(candidates, axis=1)
    dues = np.concatenate([due(source, rows[1]) for source, rows in enumerate(candidates)])
    return before, merged[:, np.lexsort((merged[0], dues))], skip
