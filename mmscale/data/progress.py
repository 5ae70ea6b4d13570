"""Progress of `mmscale data prepare` on stderr: bars on a terminal, plain lines elsewhere.

stdout is reserved for the command's result.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_FIRST_LINE = 2.0  # time after which a part writes its first plain line [s]
_LINE_EVERY = 10.0  # interval of further plain lines [s]

# Called with the absolute number of processed records.
Advance = Callable[[int], None]
# Called with the present activity of a part.
Detail = Callable[[str], None]


class Reporter:
    """Messages, and the progress of parts, one part at a time.

    Args:
        enabled: False: silent.
    """

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self._console = Console(stderr=True, highlight=False)

    def say(self, message: str) -> None:
        """Print one line."""
        if self.enabled:
            self._console.print(message, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def bar(self, what: str, total: int) -> Iterator[Advance]:
        """Progress over `total` records; call the yielded function with the number of processed records."""
        if not self.enabled:
            yield lambda done: None
        elif self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self._console) as progress:
                task = progress.add_task(what, total=total)
                yield lambda done: progress.update(task, completed=done)
        else:
            with _lines(self.say, what, f"0 of {total}") as update:
                yield lambda done: update(f"{done} of {total}")

    @contextlib.contextmanager
    def part(self, what: str) -> Iterator[Detail]:
        """A part of unknown length; call the yielded function with its present activity."""
        if not self.enabled:
            yield lambda detail: None
        elif self._console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            with Progress(*columns, console=self._console, transient=True) as progress:
                task = progress.add_task(what, total=None)
                yield lambda detail: progress.update(task, description=escape(f"{what}: {detail}"))
        else:
            with _lines(self.say, what) as update:
                yield update


@contextlib.contextmanager
def _lines(say: Callable[[str], None], what: str, detail: str = "") -> Iterator[Detail]:
    """Write a line every few seconds from a thread, since a part may spend minutes in one call of a library."""
    began, ended, latest = time.monotonic(), threading.Event(), detail

    def update(detail: str) -> None:
        nonlocal latest
        latest = detail

    def write() -> None:
        pause = _FIRST_LINE
        while not ended.wait(pause):
            shown = f"{what}: {latest}" if latest else what
            with contextlib.suppress(OSError):  # the reader of stderr is gone
                say(f"{shown}, {time.monotonic() - began:.0f} s")
            pause = _LINE_EVERY

    thread = threading.Thread(target=write, name="progress", daemon=True)
    thread.start()
    try:
        yield update
    finally:
        ended.set()
        thread.join()
