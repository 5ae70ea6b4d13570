"""What `mmscale data prepare` shows on stderr: a bar on a terminal, plain lines elsewhere.

stdout stays free for the command's result.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_LINE_EVERY = 10.0  # seconds between plain lines

# Told the absolute number of records that are through.
Advance = Callable[[int], None]


class Reporter:
    """Messages and a progress bar.

    Args:
        enabled: False: silent.
    """

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self._console = Console(stderr=True, highlight=False)

    def say(self, message: str) -> None:
        """One line."""
        if self.enabled:
            self._console.print(message, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def bar(self, what: str, total: int) -> Iterator[Advance]:
        """Progress over `total` records; the yielded function takes how many are through."""
        if not self.enabled:
            yield lambda done: None
        elif self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self._console) as progress:
                task = progress.add_task(what, total=total)
                yield lambda done: progress.update(task, completed=done)
        else:
            yield self._lines(what, total)

    def _lines(self, what: str, total: int) -> Advance:
        last = time.monotonic()

        def advance(done: int) -> None:
            nonlocal last
            if time.monotonic() - last >= _LINE_EVERY:
                last = time.monotonic()
                self.say(f"{what}: {done} of {total}")

        return advance
