"""A blend whose weights change at given sequences: which source each sequence of the stream comes from.

Each phase is a blend by itself (`packing.blend`), and every source continues in it where the phases before have left
it. A source that has given all sequences of its limit has no weight from there on, so that a phase falls into pieces.
Any stretch of the stream is still found without what precedes it. S sources.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmscale.config import Config
from mmscale.config.derived import blend_phases
from mmscale.data.stream.blending import blend, blended

Phases = Sequence[tuple[int, Sequence[float]]]  # sequence from which on, and weights of the sources
Limit = Callable[[int], int | None]  # of a number n: sequences that a source has to give if at most n, else None


@dataclass(frozen=True, eq=False)
class _Piece:
    """A part of the stream with constant shares.

    Attributes:
        start: its first sequence.
        share: of each source, adding up to 1 [S].
        before: sequences of each source that precede it [S].
    """

    start: int
    share: NDArray[np.float64]
    before: NDArray[np.int64]

    def counts(self, end: int) -> NDArray[np.int64]:
        """Sequences of each source before sequence `end`, which is in this piece or ends it [S]."""
        return self.before + blended(self.share, count=end - self.start)


class BlendPhases:
    """The blended stream. It never ends unless all sources of a phase have limits.

    Limits are asked only about positions that are read: to find them can mean to pack whole passes of a source.

    Attributes:
        spent: sources that were found to have given all, and their sequences.

    Args:
        phases: ascending; the first one at or before sequence 0. Of those at or before 0 the last one counts. In each
            phase a source has a weight.
        limits: of each source, None: none; default: none for all.
    """

    def __init__(self, phases: Phases, limits: Sequence[Limit | None] | None = None) -> None:
        first = max(number for number, (start, _) in enumerate(phases) if start <= 0)
        self._starts = [0, *(start for start, _ in phases[first + 1 :])]
        self._weights = [np.array(weights, float) for _, weights in phases[first:]]
        sources = len(self._weights[0])
        self._limits = [(source, limit) for source, limit in enumerate(limits or ()) if limit is not None]
        self._phase = 0
        self.spent: dict[int, int] = {}
        self._end: int | None = None
        self._known = 0  # sequences up to here are in the pieces
        share = self._weights[0] / self._weights[0].sum()
        self._pieces = [_Piece(0, share, np.zeros(sources, np.int64))]

    @property
    def read(self) -> NDArray[np.bool_]:
        """Whether a source has a weight in any phase [S]."""
        return np.asarray(np.any([weights > 0 for weights in self._weights], axis=0))

    def end(self, within: int) -> int | None:
        """Sequences of the whole stream if they are at most `within`; None: there are more."""
        self._find_pieces(within)
        return self._end if self._end is not None and self._end <= within else None

    def stretch(self, start: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sources of the sequences start..start+count-1, and their numbers inside their source, int64 [count] each.

        At the end of the stream there are fewer.
        """
        end = self.end(start + count)
        stop = start + count if end is None else end
        found = []
        for number, piece in enumerate(self._pieces):
            last = self._pieces[number + 1].start if number + 1 < len(self._pieces) else stop
            low, high = max(start, piece.start), min(stop, last)
            if low < high:
                source, place = blend(piece.share, start=low - piece.start, count=high - low)
                found.append((source, place + piece.before[source]))
        if not found:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        sources, places = zip(*found, strict=True)
        return np.concatenate(sources), np.concatenate(places)

    def counts(self, count: int) -> NDArray[np.int64]:
        """How many of the first `count` sequences are of each source, int64 [S]; at most as many as there are."""
        end = self.end(count)
        count = count if end is None else end
        piece = next(piece for piece in reversed(self._pieces) if piece.start <= count)
        return piece.counts(count)

    def _find_pieces(self, until: int) -> None:
        """Find the pieces up to a sequence. They do not depend on how far was looked."""
        while self._end is None and self._known < until:
            following = self._next_phase()
            stop = until if following is None else min(until, following)
            found = self._first_spent(stop)
            if found is not None:
                counts = self._pieces[-1].counts(found[0])
                self.spent.update({source: int(counts[source]) for source in found[1]})
                self._begin(found[0])
            elif stop == following:
                self._phase += 1
                self._begin(stop)
            else:
                self._known = stop

    def _next_phase(self) -> int | None:
        return self._starts[self._phase + 1] if self._phase + 1 < len(self._starts) else None

    def _first_spent(self, stop: int) -> tuple[int, list[int]] | None:
        """The first position up to `stop` at which sources of the last piece have given all, and these sources."""
        piece = self._pieces[-1]
        counts = piece.counts(stop)
        found: dict[int, list[int]] = {}
        for source, limit in self._limits:
            if not piece.share[source]:
                continue
            most = limit(int(counts[source]))
            if most is not None:
                found.setdefault(_reached(piece, source, most, stop=stop), []).append(source)
        return min(found.items()) if found else None

    def _begin(self, start: int) -> None:
        """Begin a piece with the sources that have something to give; end the stream if none has."""
        while True:
            weights = self._weights[self._phase].copy()
            weights[list(self.spent)] = 0.0
            if weights.any():
                self._pieces.append(_Piece(start, weights / weights.sum(), self._pieces[-1].counts(start)))
                return
            if self._next_phase() != start:
                self._end = start
                return
            self._phase += 1


def _reached(piece: _Piece, source: int, count: int, *, stop: int) -> int:
    """The first position from which on a source has given `count` sequences; it is at most `stop`."""
    low, high = piece.start, stop
    while low < high:
        middle = (low + high) // 2
        if piece.counts(middle)[source] >= count:
            high = middle
        else:
            low = middle + 1
    return low


def later_phases(config: Config) -> list[tuple[int, tuple[float, ...]]]:
    """Sequences of a run at which the weights of its data sets change, with the new weights."""
    size = config.train.global_batch_size
    return [(step * size, weights) for step, weights in blend_phases(config)[1:]]
