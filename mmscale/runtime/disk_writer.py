"""Writes files in a way that a full, read-only or frozen disk neither stops nor delays.

Writes a run's small files in a thread: failed writes are kept and retried, and hanging writes are not waited for.
Independent of file formats; checkpoints have their own writers (checkpoint/).

A caller waits until its write is done, so that a record is in the file when the call returns. It stops waiting when the
disk fails or does not respond. Writes then queue up in memory, in order and bounded, and are retried.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmscale.runtime.atomic_files import write_atomic
from mmscale.wording import numbered

WAIT_S = 5.0  # a longer write counts as hanging; on a busy machine a thread may start late
RETRY_S = 1.0
CLOSE_S = 10.0  # at the end, for writes that the disk still refuses
LIMIT = 64 << 20  # bytes kept in memory: 60,000 lines of metrics.jsonl
REFUSED, GOOD = "disk_refused", "disk_good"  # names of the events

OnChange = Callable[..., None]


@dataclass
class _Task:
    action: Callable[[], None]
    size: int
    key: str | None
    done: bool = False
    error: BaseException | None = None


@dataclass
class _Outage:
    """A period in which the disk accepts no writes."""

    began: float
    kept: int = 0
    lost: int = 0


class DiskWriter:
    """A queue of writes and the thread that does them.

    Args:
        place: what is written to, for messages.
        on_change: called with "disk_refused" (with `reason`) when an outage begins and "disk_good" (with `seconds`,
            `kept` and `lost` lines) when it is over. Called from any thread; it may write with this writer.
        say: prints a line for a person, as `on_change` from any thread; default: on stderr. None: nothing is printed.
        limit: of what is kept [bytes]; later writes are counted as lost.
    """

    def __init__(
        self,
        place: str,
        *,
        on_change: OnChange | None = None,
        say: Callable[[str], None] | Literal["stderr"] | None = "stderr",
        limit: int = LIMIT,
    ) -> None:
        self.place = place
        self.on_change = on_change
        self.say = _to_stderr if say == "stderr" else say
        self.limit = limit
        self._queue: deque[_Task] = deque()
        self._bytes = 0
        self._outage: _Outage | None = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        # Reentrant, because `on_change`, called under the lock, submits an event.
        self._changed = threading.Condition(threading.RLock())

    @property
    def refuses(self) -> bool:
        """Whether the disk is known to fail or hang."""
        return self._outage is not None

    def submit(self, action: Callable[[], None], *, size: int, key: str | None = None) -> None:
        """Write something after everything that was submitted before.

        Args:
            action: writes it; is called again after an OSError.
            size: memory that it keeps [bytes].
            key: a waiting action with the same key is replaced, because only the newest content of a file counts.

        Raises:
            BaseException: an error of this action, or of an earlier one that was not waited for, unless it was an
                OSError.
        """
        task = _Task(action, size, key)
        with self._changed:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if not self._enqueue(task):
                return
            if self._outage is not None or threading.current_thread() is self._thread:
                return
            self._changed.wait_for(lambda: task.done or self._outage is not None, WAIT_S)
            if not task.done and self._outage is None:
                self._begin_outage(f"no answer for {WAIT_S:g} s")
            if task.error is not None:
                self._error = None
                raise task.error

    def close(self) -> int:
        """Write everything that is left, for a limited time; returns the number of abandoned writes."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._queue, CLOSE_S)
            left = len(self._queue)
            if left:
                self._queue.clear()
                self._announce(
                    f"warning: {numbered(left, 'record')} could not be written to {self.place} and "
                    f"{'is' if left == 1 else 'are'} lost"
                )
            return left

    # --- the queue, under the lock ----------------------------------------------------------------------------------

    def _enqueue(self, task: _Task) -> bool:
        waiting = [other for other in list(self._queue)[1:] if task.key is not None and other.key == task.key]
        if waiting:
            self._bytes += task.size - waiting[0].size
            waiting[0].action, waiting[0].size = task.action, task.size
            task.done = True
            return False
        if self._bytes + task.size > self.limit:
            if self._outage is not None:
                self._outage.lost += 1
            return False
        self._queue.append(task)
        self._bytes += task.size
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="disk-writer", daemon=True)
            self._thread.start()
        self._changed.notify_all()
        return True

    def _begin_outage(self, reason: str) -> None:
        if self._outage is not None:
            return
        self._outage = _Outage(time.monotonic())
        self._changed.notify_all()
        self._announce(
            f"warning: {self.place} cannot be written: {reason}. Training continues; records are kept in memory and "
            "written when the disk takes them"
        )
        self._emit(REFUSED, place=self.place, reason=reason)

    def _end_outage(self) -> None:
        outage, self._outage = self._outage, None
        if outage is None:
            return
        seconds = time.monotonic() - outage.began
        lost = f", {outage.lost} are lost" if outage.lost else ""
        self._announce(
            f"{self.place} can be written again after {seconds:.0f} s: {numbered(outage.kept, 'record')} kept{lost}"
        )
        self._emit(GOOD, place=self.place, seconds=round(seconds, 1), kept=outage.kept, lost=outage.lost)

    def _emit(self, event: str, **fields: Any) -> None:
        if self.on_change is not None:
            try:
                self.on_change(event, **fields)
            except Exception as error:  # raised in the next caller, because this may be the thread
                self._error = self._error or error

    def _announce(self, text: str) -> None:
        if self.say is not None:
            with contextlib.suppress(Exception):
                self.say(text)

    # --- the thread -------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (task := self._next()) is not None:
            try:
                task.action()
            except OSError as error:
                self._refused(error)
                continue
            except BaseException as error:
                task.error = error
            self._done(task)

    def _next(self) -> _Task | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed, RETRY_S)
            if not self._queue:
                self._thread = None  # another thread is started when it is needed
                return None
            return self._queue[0]

    def _refused(self, error: OSError) -> None:
        where = f": {error.filename}" if error.filename else ""
        with self._changed:
            self._begin_outage(f"{error.strerror or error}{where}")
            closed = self._closed
            self._changed.wait_for(lambda: self._closed and not closed, RETRY_S)

    def _done(self, task: _Task) -> None:
        with self._changed:
            task.done = True
            if self._queue and self._queue[0] is task:  # otherwise `close` has dropped it
                self._queue.popleft()
                self._bytes -= task.size
            if task.error is not None:
                self._error = self._error or task.error
            elif self._outage is not None:
                self._outage.kept += 1
            if not self._queue:
                self._end_outage()
            self._changed.notify_all()


def _to_stderr(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


class Appended:
    """A file that lines are appended to. It is open only while one is written.

    So a disk can be unmounted or made read-only meanwhile, and a handle cannot become stale.

    Args:
        path: of the file; its folder is made if it is missing.
        writer: does the writing.
        may_write: called before every write; raises if this process must not write any more.
    """

    def __init__(self, path: Path, writer: DiskWriter, *, may_write: Callable[[], None] | None = None) -> None:
        self.path = path
        self.writer = writer
        self._may_write = may_write
        self._whole = False  # whether the file is known to end with a complete line

    def touch(self) -> None:
        """Make the file if it is missing."""
        self.writer.submit(lambda: self._write(b""), size=0)

    def append(self, line: bytes) -> None:
        """Add a line, which ends with a newline.

        Raises:
            MmscaleError: this process must not write any more.
        """
        self.writer.submit(lambda: self._write(line), size=len(line))

    def _write(self, line: bytes) -> None:
        if self._may_write is not None and line:
            self._may_write()
        # O_APPEND and one write per line: a line is complete or truncated, and never mixed with another process's.
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        try:
            file = os.open(self.path, flags, 0o644)
        except FileNotFoundError:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, flags, 0o644)
        try:
            if not self._whole:
                _end_torn_line(file)
            self._whole = False
            before = os.fstat(file).st_size
            written = os.write(file, line)
            if written < len(line):  # the disk had space for a part of it
                if os.fstat(file).st_size == before + written:
                    os.ftruncate(file, before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            self._whole = True
        finally:
            os.close(file)


def _end_torn_line(file: int) -> None:
    """End an incomplete last line, left by a writer that died, so that the next line is not appended to it."""
    size = os.fstat(file).st_size
    if size and os.pread(file, 1, size - 1) != b"\n":
        os.write(file, b"\n")


def replacing(path: Path, content: bytes) -> Callable[[], None]:
    """An action that replaces a file's content atomically; not synced to disk, as it may run at every step."""
    return functools.partial(write_atomic, path, content, durable=False)
