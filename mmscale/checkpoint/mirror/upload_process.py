"""The trainer's side of the mirror: starts the uploading process, passes requests on and collects its events.

Nothing here waits for the store or raises because of it: a mirror never delays training and never ends it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mmscale
from mmscale import bounded
from mmscale.checkpoint.mirror.mirror_settings import MirrorSettings
from mmscale.checkpoint.mirror.worker import FAILED, FINISH, IDLE, LOOK, REFUSED

_GRACE_S = 2.0
# Not `-m`, with which modules in the working directory could shadow those of the standard library. The folder of this
# package is appended to the search path.
_PROGRAM = (
    f"import sys; sys.path.append({str(Path(mmscale.__file__).resolve().parents[1])!r}); "
    "from mmscale.checkpoint.mirror.worker import main; main()"
)
_MOST_BYTES = 1 << 20  # read from the process at once


class UploadProcess:
    """Uploads during training. One rank has it.

    Args:
        settings: what and how.
        on_event: writes events of the run.
        warn: prints a warning for the user; called at the first of several failures in a row.
    """

    def __init__(self, settings: MirrorSettings, *, on_event: Callable[..., None], warn: Callable[[str], None]) -> None:
        self.settings = settings
        self.on_event = on_event
        self.warn = warn
        self._process: subprocess.Popen[bytes] | None = None
        self._received = b""
        self._sent = 0  # requests since the process started
        self._answered = -1
        self._failing = False
        self._finishing = False  # the process is ending and accepts no more requests

    def request_upload(self) -> None:
        """A checkpoint was committed, or one may be missing in the mirror: start the process, or notify it."""
        self.poll()
        if self._finishing:
            self.close()
        if self._process is None:
            self._start()
        else:
            self._send(LOOK)

    def poll(self) -> None:
        """Pass on the events that have arrived. Takes microseconds."""
        process = self._process
        if process is None or process.stdout is None:
            return
        ended = process.poll() is not None
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(process.stdout.fileno(), _MOST_BYTES):
                self._received += chunk
        *lines, self._received = self._received.split(b"\n")
        for line in lines:
            with contextlib.suppress(*bounded.BAD_CONTENT):
                self._handle_event(bounded.parse_json(line))
        if ended:
            self._process = None
            if not self._idle:
                self._handle_event(
                    {"event": FAILED, "reason": f"the uploading process ended with {process.returncode}"}
                )

    def finish(self) -> None:
        """No checkpoint follows: tell the process to end when the mirror is up to date."""
        self.request_upload()
        self._send(FINISH)
        self._finishing = True

    @property
    def _idle(self) -> bool:
        """Whether the mirror is up to date since the last request."""
        return self._answered >= self._sent

    @property
    def busy(self) -> bool:
        """Whether something is still to be uploaded."""
        self.poll()
        return self._process is not None and not self._idle

    def close(self, *, within_s: float = _GRACE_S) -> None:
        """End the process. The next attempt, or `mmscale ckpt mirror`, completes unfinished uploads."""
        process, self._process, self._finishing = self._process, None, False
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            process.wait(timeout=within_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _start(self) -> None:
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # libraries may print credentials; reasons of failures are sent as events
                bufsize=0,
            )
        except OSError as error:
            self._handle_event({"event": FAILED, "reason": f"the uploading process did not start: {error}"})
            return
        assert self._process.stdin is not None and self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        os.set_blocking(self._process.stdin.fileno(), False)
        self._received, self._sent, self._answered = b"", -1, -1
        self._send(self.settings.line())

    def _send(self, line: str) -> None:
        process = self._process
        if process is None or process.stdin is None:
            return
        with contextlib.suppress(OSError):  # it has ended, which `poll` notices, or its pipe is full of requests
            os.write(process.stdin.fileno(), f"{line}\n".encode())
            self._sent += 1

    def _handle_event(self, event: dict[str, Any]) -> None:
        name = str(event.pop("event", ""))
        if name == IDLE:
            self._answered, self._failing = int(event["after"]), False
            return
        self.on_event(name, **event)
        if name in (FAILED, REFUSED) and not self._failing:
            self.warn(f"warning: the mirror {self.settings.url} is behind: {event.get('reason')}")
        self._failing = name == FAILED


def wait_for(process: UploadProcess, *, within_s: float) -> bool:
    """Wait until the mirror is up to date; returns whether it is. For commands; ranks wait together."""
    until = time.monotonic() + within_s
    while process.busy and time.monotonic() < until:
        time.sleep(0.1)
    return not process.busy
