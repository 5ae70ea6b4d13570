"""Stop requests by signal: recorded when a signal arrives, agreed on by all ranks at a step boundary.

Handlers neither save nor communicate. The launcher requeues jobs.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType

import torch

from mmscale.runtime.rank_env import GRACE_S

# SLURM sends SIGUSR2 before a time limit or a preemption (as requested by the launcher) and SIGTERM at any other end; a
# person who wants a final stop sends SIGUSR1. The largest code on any rank counts for all. SIGHUP, of a closed
# terminal, counts as SIGTERM.
_CODES = {signal.SIGINT: 1, signal.SIGTERM: 2, signal.SIGHUP: 2, signal.SIGUSR2: 3, signal.SIGUSR1: 4}


class StopRequest:
    """Handlers of SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 and SIGINT while it is entered. A second SIGINT interrupts at once.

    A launcher may have blocked these signals until now; pending ones are delivered on entering. Only the process that
    entered it records anything: a forked process (a loader, a writer) inherits the handlers and is signalled by SLURM
    as well, but its end must not count as a fault.

    Args:
        grace_s: how long this process may continue after a request, before it is ended [seconds].

    Attributes:
        name: the signal that this process received.
        agreed_name: the signal that all ranks stop for, once they agreed.
    """

    def __init__(self, *, grace_s: float = GRACE_S) -> None:
        self.grace_s = grace_s
        self.name: str | None = None
        self.agreed_name: str | None = None
        self._noted: float | None = None
        self._process = os.getpid()
        self._mask: set[int] = set()
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in _CODES:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup
            self._previous[number] = signal.signal(number, self._note)
        self._mask = {int(number) for number in signal.pthread_sigmask(signal.SIG_UNBLOCK, _CODES)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # First the mask: a repeated request while the process ends must not end it by the default action.
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return
        if number == signal.SIGINT and self.name == "SIGINT":
            raise KeyboardInterrupt
        self._noted = self._noted or time.monotonic()
        if self.name is None or _CODES[signal.Signals(number)] > _CODES[signal.Signals[self.name]]:
            self.name = signal.Signals(number).name

    def ask(self, number: signal.Signals) -> None:
        """Request a stop as this signal would."""
        self._note(number, None)

    @property
    def waited_s(self) -> float:
        """Time since the first stop request to this process; 0 if another process was asked."""
        return 0.0 if self._noted is None else time.monotonic() - self._noted

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop; the result is the same on every rank.

        Every rank calls it at the same step.
        """
        return self.agreed_with(device)[0]

    def agreed_with(self, device: torch.device, *numbers: int) -> tuple[bool, list[int]]:
        """The same, and the maxima of further numbers over all ranks, so that each step needs only one collective.

        Args:
            device: of the collective.
            numbers: as many on every rank.
        """
        code = _CODES[signal.Signals[self.name]] if self.name is not None else 0
        flags = torch.tensor([code, *numbers], device=device)
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        stop, *maxima = flags.tolist()
        self.agreed_name = next((number.name for number, code in _CODES.items() if code == stop), None)
        return bool(stop), maxima
