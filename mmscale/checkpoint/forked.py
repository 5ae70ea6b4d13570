"""Runs a function in a supervised forked process, which sees memory as of the fork and never outlives its parent.

Independent of checkpoints. In host memory a fork is a snapshot of all tensors without a copy; device tensors must be
copied to the host before. The child must not use anything that threads of the parent hold (collectives, the loader, the
terminal).
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
KILL_S = 1.0  # for the kernel to end a killed process
_POLL_S = 0.002
_LENGTH = 8  # bytes of the length before every message

# Looked up once, in the parent, to do as little as possible between the fork and the child's work. Linux only.
_PRCTL = ctypes.CDLL(None, use_errno=True).prctl if sys.platform == "linux" else None

Send = Callable[[Any], None]


class Forked:
    """A call in a forked process, with its messages and result.

    Args:
        work: called in the child with a function that sends a picklable message to the parent; its return value is the
            last message. It must not write to stdout or stderr.
        name: a short description for messages ("the writer").

    Attributes:
        messages: received so far, in order.
        result: return value of `work`, once it is done.
        problem: one line with the reason for the missing result; None while it runs or if there is a result.
    """

    def __init__(self, work: Callable[[Send], Any], *, name: str) -> None:
        self.name = name
        self.messages: list[Any] = []
        self.result: Any = None
        self.problem: str | None = None
        self._running = True
        self._received = bytearray()
        parent = os.getpid()
        self._pipe, sending = os.pipe()
        os.set_blocking(self._pipe, False)
        # Blocked during the fork: a stop signal must not reach the child before the child ignores it.
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
        """Whether it was still running at the last `poll`."""
        return self._running

    def poll(self) -> bool:
        """Receive messages and notice the end. Takes microseconds and never blocks. True while it runs."""
        if not self._running:
            return False
        self._receive()
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:  # another process has reaped it; its messages show how it ended
            pid, status = self.pid, 0
        if pid:
            self._receive()
            self._end(os.waitstatus_to_exitcode(status))
        return self._running

    def wait(self, *, timeout_s: float) -> bool:
        """Poll until it has ended, up to this time. True if it has ended."""
        deadline = time.monotonic() + timeout_s
        while self.poll():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def kill(self) -> bool:
        """End it with SIGKILL. False if the kernel does not let it die in time (hanging storage): poll later."""
        if self._running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        return self.wait(timeout_s=KILL_S)

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


def _be_child(work: Callable[[Send], Any], sending: int, parent: int, *, mask: Iterable[int]) -> None:
    """The complete run of the child process, which never returns into the parent's code."""
    status = 1
    try:
        die_with(parent)
        for number in _STOP_SIGNALS:  # stop requests go to the trainer, which waits for this process
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        gc.disable()  # a garbage collection would copy the parent's pages, and may wait for its threads
        torch.set_num_threads(1)  # the parent's OpenMP threads do not exist here

        def send(message: Any) -> None:
            body = pickle.dumps(message)
            rest = memoryview(len(body).to_bytes(_LENGTH, "little") + body)
            while rest:
                rest = rest[os.write(sending, rest) :]

        try:
            with torch.no_grad():
                send((_RESULT, work(send)))
            status = 0
        except MmscaleError as error:
            send((_PROBLEM, error.cause))
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            send((_PROBLEM, f"{error.strerror or error}{where}"))
        except BaseException as error:
            trace = traceback.extract_tb(error.__traceback__)[-1]
            send((_PROBLEM, f"{type(error).__name__}: {error} ({trace.filename}:{trace.lineno})"))
    finally:
        os._exit(status)


def die_with(parent: int) -> None:
    """End this process when its parent ends, in whatever way. Linux only; elsewhere it has no effect."""
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent ended before prctl took effect
            os._exit(1)
