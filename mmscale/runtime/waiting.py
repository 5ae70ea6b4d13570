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
from collections.abc import Callable, Iterator
from typing import Self

FIRST_LINE = 1.0  # seconds until the first line; after about 2 s of silence users assume that a command hangs
LINE_EVERY = 10.0  # seconds between lines about the same work

# Called with the present activity.
Detail = Callable[[str], None]


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


class Waiting:
    """Prints the present activity, until it is closed.

    The first line comes after a second; further ones whenever the activity changes, but at most one a second, and one
    every ten seconds while it stays the same. Work that is done within a second is not mentioned.

    Args:
        what: the first activity.
        enabled: False: nothing is printed.
        say: prints a line.

    Attributes:
        began: time of its creation [seconds since 1970].
    """

    def __init__(self, what: str, *, enabled: bool = True, say: Callable[[str], None] = to_stderr) -> None:
        self._what, self._say = what, say
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

    def tell(self, what: str) -> None:
        """Set the present activity."""
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
            what, now = self._what, time.monotonic()
            if what == said and now - said_at < LINE_EVERY:
                continue
            self._say(f"{what} ..." if what != said else f"{what} ... {now - self._since:.0f} s")
            said, said_at = what, now


@contextlib.contextmanager
def waiting(what: str, *, enabled: bool = True, say: Callable[[str], None] = to_stderr) -> Iterator[Detail]:
    """Print the present activity while the block runs; yields a function that sets the activity."""
    with Waiting(what, enabled=enabled, say=say) as shown:
        yield shown.tell
