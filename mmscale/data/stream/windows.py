"""Deals a window of the blended stream into micro-batches of nearly equal modality shares. A pure function.

b sequences of a micro-batch, K modalities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmscale.data.stream.packing import EMPTY_SEQUENCE, Packing, Purpose, deal, permutation
from mmscale.data.stream.sequences import SequenceStream

_NO_SOURCE = -1


@dataclass(frozen=True, kw_only=True)
class Dealing:
    """How windows are dealt.

    Attributes:
        groups: micro-batches of a window.
        micro_batch_size: sequences of a micro-batch.
        modalities: K.
        balance: deal; otherwise micro-batches are consecutive sequences of the stream.
        shuffle: put the micro-batches into a random order.
        seed: of this order.
    """

    groups: int
    micro_batch_size: int
    modalities: int
    balance: bool
    shuffle: bool
    seed: int


@dataclass(frozen=True, eq=False)
class Window:
    """Sequences that are dealt together, in the order of the micro-batches."""

    filled: int  # micro-batches that hold a sequence; the others come after them
    sources: NDArray[np.int64]  # of each sequence; -1: empty
    places: NDArray[np.int64]  # its number inside its source's stream
    packing: Packing  # documents of each sequence, numbered inside its source
    counts: NDArray[np.int64]  # tokens of each sequence of each micro-batch [groups, b, K]
    labels: NDArray[np.int64]  # trained labels of each micro-batch [groups, K]


def deal_window(
    number: int,
    dealing: Dealing,
    *,
    streams: Sequence[SequenceStream],
    of_source: NDArray[np.int64],
    place: NDArray[np.int64],
) -> Window:
    """Deal a window.

    Args:
        number: of the window.
        dealing: how.
        streams: of the sources.
        of_source: source of each sequence; a window with fewer sequences than it can hold is filled with empty ones.
        place: its number inside its source's stream, ascending for each source without a gap.

    Raises:
        DataError: a table of the data is damaged.
    """
    count, size = len(of_source), dealing.groups * dealing.micro_batch_size
    counts = np.zeros((size, dealing.modalities), np.int64)
    labels = np.zeros((size, dealing.modalities), np.int64)
    sources = np.full(size, _NO_SOURCE, np.int64)
    sources[:count] = of_source
    parts: list[Packing] = []
    before = np.zeros(size, np.int64)  # place of each sequence among all parts
    taken = 0
    for position, stream in enumerate(streams):
        rows = np.flatnonzero(sources == position)
        if not len(rows):
            continue
        begin = 0
        for block, places in stream.stretch(int(place[rows[0]]), len(rows)):
            some = rows[begin : begin + len(places)]
            counts[some], labels[some] = block.counts[places], block.labels[places]
            before[some] = taken + np.arange(len(places))
            parts.append(block.packing.take(places))
            begin += len(places)
            taken += len(places)
    before[count:] = taken  # the empty sequence, for all of them
    packing = Packing.joined([*parts, EMPTY_SEQUENCE])

    groups = np.arange(size).reshape(dealing.groups, dealing.micro_batch_size)
    filled = -(-count // dealing.micro_batch_size)
    if dealing.balance and filled:
        groups[:filled] = deal(counts[: filled * dealing.micro_batch_size], group=dealing.micro_batch_size)
    if dealing.shuffle:
        groups[:filled] = groups[
            permutation(filled, seed=dealing.seed, source=0, purpose=Purpose.GROUPS, number=number)
        ]
    order = groups.ravel()
    places = np.full(size, _NO_SOURCE, np.int64)
    places[:count] = place
    return Window(
        filled=filled,
        sources=sources[order],
        places=places[order],
        packing=packing.take(before[order]),
        counts=counts[order].reshape(dealing.groups, -1, dealing.modalities),
        labels=labels[order].reshape(dealing.groups, -1, dealing.modalities).sum(axis=1),
    )
