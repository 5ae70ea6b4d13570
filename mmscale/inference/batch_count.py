"""Counts the batches of a long evaluation, for the lines that show its progress."""

from __future__ import annotations

import itertools
from collections.abc import Callable

# Called with the place that the work has reached, e.g. "batch 12 of 50".
Place = Callable[[str], None]


def silent(place: str) -> None:
    """A `Place` that shows nothing."""


def counted(at: Place, what: str, total: int | None = None) -> Callable[[], None]:
    """A function to call before each batch.

    Args:
        at: shows the place.
        what: the batches, e.g. "batch" or "questions, batch".
        total: number of batches; later calls show nothing. None: unknown.
    """
    numbers = itertools.count(1)

    def on_batch() -> None:
        number = next(numbers)
        if total is None:
            at(f"{what} {number:,}")
        elif number <= total:
            at(f"{what} {number:,} of {total:,}")

    return on_batch
