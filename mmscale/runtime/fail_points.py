"""Fail points: named places in the code where a test can kill the process, raise an error or change files.

Without a handler they do nothing. Forked processes inherit the handler. resilience/inject.py is for faults in whole
runs, requested by an environment variable. No torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

_handler: Callable[[str], None] | None = None


def reached(place: str) -> None:
    """Call the handler with the name of a place, if a test has set one."""
    if _handler is not None:
        _handler(place)


@contextlib.contextmanager
def handled(handler: Callable[[str], None]) -> Iterator[None]:
    """Set the handler while the context is active, for all threads of this process; used only by tests.

    Args:
        handler: called with the name of every place that is reached, in the thread that reaches it.
    """
    global _handler
    before, _handler = _handler, handler
    try:
        yield
    finally:
        _handler = before
