"""Shows that a command is working: a line on stderr after a second, and more lines later.

For work of unknown length: imports, reading a checkpoint, a subprocess. Imports nothing heavy, so that lines are
printed while torch is imported.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Protocol, Self

FIRST_LINE = 1.0  # seconds until the first line; after about 2 s of silence users assume that a command hangs
LINE_EVERY = 10.0  # seconds between lines about the same work


class Detail(Protocol):
    """`ActivityReporter.update`."""

    def __call__(self, what: str, place: str = "") -> None:
        """Set the present activity and the place in it."""


def to_stderr(message: str) -> None:
    """Print one line on stderr; the reader may be gone."""
    line = f"{message}\n"
    with contextlib.suppress(OSError, ValueError):
        try:
            descriptor = sys.stderr.fileno()
        except (OSError, ValueError):  # a stream of a test
            sys.stderr.write(line)
        else:
            # Without a lock, which a fork could copy in its locked state.
            os.write(descriptor, line.encode(errors="replace"))


class ActivityReporter:
    """Prints the present activity, until it is closed.

    The first line comes after a second; further ones whenever the activity changes, but at most one a second, and one
    every ten seconds while it stays the same, with the place that it has reached. Work that is done within a second is
    not mentioned.

    Args:
        what: the first activity.
        enabled: False: nothing is printed.

    Attributes:
        began: time of its creation [seconds since 1970].
    """

    def __init__(self, what: str, *, enabled: bool = True) -> None:
        self._what = what
        self._place = ""
        self._since = time.monotonic()
        self.began = time.time()  # [seconds since 1970]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._report, name="waiting", daemon=True) if enabled else None
        if self._thread is not None:
            self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, what: str, place: str = "") -> None:
        """Set the present activity, and the place in it, e.g. "batch 12 of 50"; a new place prints no line at once."""
        self._place = place
        if what != self._what:
            self._since = time.monotonic()
            self._what = what

    def close(self) -> None:
        """Stop printing. Later calls do nothing."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _report(self) -> None:
        said, said_at = "", 0.0
        while not self._ended.wait(FIRST_LINE):
            what, place, now = self._what, self._place, time.monotonic()
            if what == said and now - said_at < LINE_EVERY:
                continue
            since = f" {place and f'{place}, '}{now - self._since:.0f} s" if what == said else ""
            to_stderr(f"{what} ...{since}")
            said, said_at = what, now


@contextlib.contextmanager
def report_activity(what: str, *, enabled: bool = True) -> Iterator[Detail]:
    """Print the present activity while the block runs; yields a function that sets the activity."""
    with ActivityReporter(what, enabled=enabled) as shown:
        yield shown.update
