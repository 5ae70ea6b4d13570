"""A blend whose weights change at given sequences: which source each sequence of the stream comes from.

Each phase is a blend by itself (`packing.blend`), and every source continues in it where the phases before have left
it. So any stretch of the stream is still found without what precedes it. S sources.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mmscale.config import Config
from mmscale.config.derived import blend_phases
from mmscale.data.stream.packing import blend, blended

Phases = Sequence[tuple[int, Sequence[float]]]  # sequence from which on, and weights of the sources


class BlendPhases:
    """The blended stream.

    Args:
        phases: ascending; the first one at or before sequence 0. Of those at or before 0 the last one counts. In each
            phase a source has a weight.
    """

    def __init__(self, phases: Phases) -> None:
        first = max(number for number, (start, _) in enumerate(phases) if start <= 0)
        self._starts = [0, *(start for start, _ in phases[first + 1 :])]
        self.shares = [np.array(weights, float) / np.sum(weights) for _, weights in phases[first:]]
        self._before = [np.zeros(len(self.shares[0]), np.int64)]
        for share, start, stop in zip(self.shares, self._starts, self._starts[1:], strict=False):
            self._before.append(self._before[-1] + blended(share, count=stop - start))

    @property
    def read(self) -> NDArray[np.bool_]:
        """Whether a source has a weight in any phase [S]."""
        return np.asarray(np.any([share > 0 for share in self.shares], axis=0))

    def stretch(self, start: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sources of the sequences start..start+count-1, and their numbers inside their source, int64 [count] each."""
        found = []
        for number, (begin, share) in enumerate(zip(self._starts, self.shares, strict=True)):
            end = self._starts[number + 1] if number + 1 < len(self._starts) else start + count
            low, high = max(start, begin), min(start + count, end)
            if low < high:
                source, place = blend(share, start=low - begin, count=high - low)
                found.append((source, place + self._before[number][source]))
        if not found:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        sources, places = zip(*found, strict=True)
        return np.concatenate(sources), np.concatenate(places)

    def counts(self, count: int) -> NDArray[np.int64]:
        """How many of the first `count` sequences are of each source, int64 [S]."""
        number = int(np.searchsorted(self._starts, count, side="right")) - 1
        return self._before[number] + blended(self.shares[number], count=count - self._starts[number])


def later_phases(config: Config) -> list[tuple[int, tuple[float, ...]]]:
    """Sequences of a run from which on its data sets have other weights, and these."""
    size = config.train.global_batch_size
    return [(step * size, weights) for step, weights in blend_phases(config)[1:]]
