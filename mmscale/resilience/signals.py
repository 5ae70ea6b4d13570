"""A request to stop, from the outside: noted when a signal comes, agreed on by all ranks at a step's border.

Nothing is saved or sent from inside a handler; requeueing is the launcher's business.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType

import torch

from mmscale.runtime.rank_env import GRACE_S

# SIGUSR2 is what SLURM is told to send before a time limit or a preemption, SIGTERM what it sends at any other end,
# SIGUSR1 what a person sends who does not want the run back. The largest code on any rank counts for all.
# SIGHUP, of a terminal that is closed, counts as SIGTERM.
_CODES = {signal.SIGINT: 1, signal.SIGTERM: 2, signal.SIGHUP: 2, signal.SIGUSR2: 3, signal.SIGUSR1: 4}


class StopRequest:
    """Handlers of SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 and SIGINT while it is entered. A second SIGINT interrupts at once.

    A launcher may have blocked them until now: what came meanwhile is delivered on entering. Only the process that
    entered it notes anything: a forked one (a loader, a writer) inherits the handlers, SLURM signals it as well, and
    its end would be taken for a fault.

    Args:
        grace_s: how long this process may go on after a request, before it is ended [seconds].

    Attributes:
        name: the signal that came to this process.
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
        # First the mask: a request that is repeated while the process ends must not end it by the default action.
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
        """Ask as this signal would."""
        self._note(number, None)

    @property
    def waited_s(self) -> float:
        """Since this process was first asked to stop; 0 if it was another one."""
        return 0.0 if self._noted is None else time.monotonic() - self._noted

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop: the same answer on every rank. Every rank calls it at the same step."""
        return self.agreed_with(device)[0]

    def agreed_with(self, device: torch.device, *numbers: int) -> tuple[bool, list[int]]:
        """The same, and the maxima of further numbers over all ranks: what is agreed on at every step travels at once.

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
