"""An upper limit of processor time, for work that hostile or large input could make endless.

The limit distinguishes seconds from hours, not fast from slow: a slow or busy machine, or a garbage collection in a
large process, never reaches it. Benchmarks measure speed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

CEILING_S = 60.0


@contextlib.contextmanager
def bounded_work() -> Iterator[None]:
    """Fail if the block takes more than `CEILING_S` seconds of this process's processor time."""
    began = time.process_time()
    yield
    took = time.process_time() - began
    assert took < CEILING_S, f"it took {took:.0f} s of processor time; it should take a few at most"
