"""Standard output and error that never raise and never block for long.

If the output is full, frozen or closed, its lines are kept for a while, and the process continues. Only for processes
that train or supervise; other commands report output errors.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import Any, TextIO

from mmscale.runtime.disk_writer import DiskWriter

_KEPT = 1 << 20  # bytes
_GONE = (errno.EPIPE, errno.EBADF)  # the reader has gone for good


class _Guarded(io.TextIOBase):
    """A text stream that writes whole lines to a file descriptor through a DiskWriter."""

    def __init__(self, original: TextIO, number: int) -> None:
        self.original = original
        self._number = number
        self._writer = DiskWriter(f"output {number}", say=None, limit=_KEPT)
        self._text = ""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.original.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self.original.errors

    @property
    def buffer(self) -> Any:
        return self.original.buffer

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return self.original.isatty()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._text += text
        if "\n" in text:
            whole, _, self._text = self._text.rpartition("\n")
            self._submit(f"{whole}\n")
        return len(text)

    def flush(self) -> None:
        text, self._text = self._text, ""
        if text:
            self._submit(text)

    def _submit(self, text: str) -> None:
        rest = memoryview(text.encode(self.encoding or "utf-8", "backslashreplace"))

        def write() -> None:
            nonlocal rest
            while rest:
                try:
                    rest = rest[os.write(self._number, rest) :]
                except OSError as error:
                    if error.errno in _GONE:
                        return
                    raise

        self._writer.submit(write, size=len(rest))


_guarded: list[tuple[str, _Guarded]] = []


def guard() -> None:
    """Replace this process's sys.stdout and sys.stderr if they are the original ones.

    Children get the original ones.
    """
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        try:
            real = not isinstance(stream, _Guarded) and stream.fileno() == number
        except (OSError, ValueError, AttributeError):
            continue
        if real:
            with contextlib.suppress(OSError):
                stream.flush()
            guarded = _Guarded(stream, number)
            _guarded.append((name, guarded))
            setattr(sys, name, guarded)


def _in_child() -> None:
    """After a fork: the child has no writer thread."""
    for name, guarded in _guarded:
        if getattr(sys, name) is guarded:
            setattr(sys, name, guarded.original)
    _guarded.clear()


os.register_at_fork(after_in_child=_in_child)
