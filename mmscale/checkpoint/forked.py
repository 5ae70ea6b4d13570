"""A function in a forked process, supervised: it sees memory as it was at the fork, and it never outlives its parent.

Knows nothing of checkpoints. On a host a fork is a snapshot of all tensors without a copy; device tensors have to be on
the host before. The child must not use what threads of the parent hold (collectives, the loader, the terminal).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import torch

from mmscale.errors import MmscaleError

_PR_SET_PDEATHSIG = 1
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_CHUNK = 1 << 16
_POLL_S = 0.002
_LENGTH = 8  # bytes before every message that say how long it is

# Looked up once, in the parent: between fork and the child's work as little as possible. Linux only.
_PRCTL = ctypes.CDLL(None, use_errno=True).prctl if sys.platform == "linux" else None

Tell = Callable[[Any], None]


class Forked:
    """A call in a forked process, and what it sends home.

    Args:
        work: is called in the child with a function that sends a picklable message to the parent; what it gives back is
            the last message. It must not write to stdout or stderr.
        name: what it is, in a few words for messages ("the writer").

    Attributes:
        messages: what has been sent so far, in order.
        result: what `work` gave back, once it is done.
        problem: in one line why there is no result; None while it runs or if there is one.
    """

    def __init__(self, work: Callable[[Tell], Any], *, name: str) -> None:
        self.name = name
        self.messages: list[Any] = []
        self.result: Any = None
        self.problem: str | None = None
        self._running = True
        self._received = bytearray()
        parent = os.getpid()
        self._pipe, sending = os.pipe()
        os.set_blocking(self._pipe, False)
        # A request to stop must not reach the child before it says that it ignores them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            self.pid = os.fork()
            if self.pid == 0:
                _be_child(work, sending, parent, mask=before)
        except OSError as error:
            os.close(self._pipe)
            self._running, self.pid = False, -1
            self.problem = f"{name} could not be started: {error.strerror}"
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(sending)

    @property
    def running(self) -> bool:
        """Whether it is at work still, as of the last `poll`."""
        return self._running

    def poll(self) -> bool:
        """Take in what was sent, notice the end. Microseconds; never blocks. True while it runs."""
        if not self._running:
            return False
        self._receive()
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:  # someone else has reaped it: what it sent tells how it went
            pid, status = self.pid, 0
        if pid:
            self._receive()
            self._end(os.waitstatus_to_exitcode(status))
        return self._running

    def wait(self, *, timeout_s: float) -> bool:
        """Poll until it has ended, at most this long. True if it has."""
        deadline = time.monotonic() + timeout_s
        while self.poll():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def kill(self, *, timeout_s: float = 1.0) -> bool:
        """End it with SIGKILL. False if the kernel does not let it die in time (storage that hangs): poll later."""
        if self._running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        return self.wait(timeout_s=timeout_s)

    def _receive(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self._pipe, _CHUNK):
                self._received += part
        while len(self._received) >= _LENGTH:
            end = _LENGTH + int.from_bytes(self._received[:_LENGTH], "little")
            if len(self._received) < end:
                break
            self.messages.append(pickle.loads(self._received[_LENGTH:end]))  # noqa: S301  of our own child
            del self._received[:end]

    def _end(self, status: int) -> None:
        self._running = False
        os.close(self._pipe)
        kind, value = self.messages.pop() if self.messages and _is_last(self.messages[-1]) else (None, None)
        if kind == _RESULT:
            self.result = value
        elif kind == _PROBLEM:
            self.problem = value
        elif status < 0:
            self.problem = f"{self.name} was ended by {_signal_name(-status)}"
        else:
            self.problem = f"{self.name} ended with exit status {status} and no result"


_RESULT, _PROBLEM = "__result__", "__problem__"


def _is_last(message: Any) -> bool:
    return isinstance(message, tuple) and len(message) == 2 and message[0] in (_RESULT, _PROBLEM)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _be_child(work: Callable[[Tell], Any], sending: int, parent: int, *, mask: Iterable[int]) -> None:
    """The child's whole life; it never returns into the parent's code."""
    status = 1
    try:
        die_with(parent)
        for number in _STOP_SIGNALS:  # a request to stop goes to the trainer, which waits for this process
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        gc.disable()  # collecting what the parent left would copy its pages, and may wait for its threads
        torch.set_num_threads(1)  # the parent's OpenMP threads do not exist here

        def tell(message: Any) -> None:
            body = pickle.dumps(message)
            rest = memoryview(len(body).to_bytes(_LENGTH, "little") + body)
            while rest:
                rest = rest[os.write(sending, rest) :]

        try:
            with torch.no_grad():
                tell((_RESULT, work(tell)))
            status = 0
        except MmscaleError as error:
            tell((_PROBLEM, error.cause))
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            tell((_PROBLEM, f"{error.strerror or error}{where}"))
        except BaseException as error:
            trace = traceback.extract_tb(error.__traceback__)[-1]
            tell((_PROBLEM, f"{type(error).__name__}: {error} ({trace.filename}:{trace.lineno})"))
    finally:
        os._exit(status)


def die_with(parent: int) -> None:
    """End this process when its parent ends, however that happens. Linux only; elsewhere nothing is promised."""
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended in between
            os._exit(1)
