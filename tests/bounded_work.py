"""A ceiling for work that hostile or large input could multiply without end.

It tells seconds from hours, not fast from slow: a slow machine, a busy one, or a collection of garbage in a large
process never meets it. Speed is measured in benchmarks.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

CEILING_S = 60.0


@contextlib.contextmanager
def bounded_work() -> Iterator[None]:
    """Fail if what is inside takes more than `CEILING_S` seconds of this process's processor time."""
    began = time.process_time()
    yield
    took = time.process_time() - began
    assert took < CEILING_S, f"it took {took:.0f} s of processor time; it should take a few at most"
