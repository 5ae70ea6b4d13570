"""Stop requests to a job: signals to its process, and the file that `mmscale stop` writes."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from launch.policy import STOPPED
from launch.record import ask_stop, stop_asked

_LOOK_S = 1.0  # between polls for a stop request
NOTED = (signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class StopRequests:
    """The requests that a job has received so far.

    Args:
        folder: of the launch.

    Attributes:
        signals: names of the received signals, in order.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.signals: list[str] = []
        self._looked, self._known = float("-inf"), False

    @contextlib.contextmanager
    def noting_signals(self) -> Iterator[None]:
        """Record signals instead of ending the process; the supervisor's loop passes them on."""
        # nohup ignores SIGHUP. A batch script ignores requests to save only until this process handles them.
        deaf = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
        heard = [number for number in NOTED if number not in deaf]
        before = {number: signal.signal(number, self._note) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(signal.Signals(number).name)

    def stopping(self) -> bool:
        """Whether this process was asked to end, without a query to SLURM."""
        return bool(self.signals) or self.asked()

    def asked(self) -> bool:
        """Whether a person has requested a stop; polled rarely, because many clients share the file system."""
        now = time.monotonic()
        if not self._known and now - self._looked >= _LOOK_S:
            self._known, self._looked = stop_asked(self.folder), now
        return self._known

    def status_for_slurm(self, status: int) -> int:
        """Exit status of the job.

        SLURM and its mail call every status but 0 a failure, but a stop on request is not one.

        `mmscale status` shows such a run as stopped.
        """
        if status != STOPPED or not ("SIGUSR1" in self.signals or stop_asked(self.folder)):
            return status
        with contextlib.suppress(OSError):
            ask_stop(self.folder)  # a request by SIGUSR1 has written no file
        return 0
