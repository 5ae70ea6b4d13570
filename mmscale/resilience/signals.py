"""A request to stop, from the outside: noted when a signal comes, agreed on by all ranks at a step's border.

Nothing is saved or sent from inside a handler; requeueing is the launcher's business.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

import torch

_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class StopRequest:
    """Handlers of SIGTERM, SIGUSR2 and SIGINT while it is entered. A second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.name is not None:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop: the same answer on every rank. Every rank calls it at the same step."""
        return self.agreed_with(device)[0]

    def agreed_with(self, device: torch.device, *numbers: int) -> tuple[bool, list[int]]:
        """The same, and the maxima of further numbers over all ranks: what is agreed on at every step travels at once.

        Args:
            device: of the collective.
            numbers: as many on every rank.
        """
        flags = torch.tensor([int(self.name is not None), *numbers], device=device)
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        stop, *maxima = flags.tolist()
        return bool(stop), maxima
