"""Fault injection for tests: kills, stops or slows down a rank, or fails its storage, at a place and a step.

MMSCALE_FAULTS="RANK:STEP:PLACE:ACTION[=VALUE], ..." with `*` for any rank or step, e.g. `1:4:write:ENOSPC`. Without the
variable this module does nothing. It is independent of the recovery that tests check.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mmscale.errors import ConfigError

VARIABLE = "MMSCALE_FAULTS"
# In the trainer: begin: before a step requests its batch; step: after a step, before its boundary; eval: before each
# batch of an evaluation, and at its end; save: a save starts; finalize: all ranks have written. In the processes of a
# save: write: before each write; commit: before rank 0 commits.
PLACES = ("begin", "step", "eval", "save", "finalize", "write", "commit")
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "usr2": signal.SIGUSR2}
_ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EROFS")
ACTIONS = (*_SIGNALS, "hang", "slow", "wait", *_ERRORS)
_POLL_S = 0.05


@dataclass(frozen=True)
class Fault:
    """One fault to inject.

    Attributes:
        rank, step: where; None: anywhere.
        place: one of PLACES.
        action: one of ACTIONS. kill, stop, term, usr2: a signal to the process that reaches the place; hang: it opens a
            pipe that nobody reads; slow: it sleeps `value` seconds; wait: it waits while `file` exists;
            ENOSPC, ...: its storage fails with this error.
        value: seconds of `slow`.
        file: of `wait`; its name has no comma and no colon.
    """

    rank: int | None
    step: int | None
    place: str
    action: str
    value: float = 0.0
    file: str = ""


@dataclass
class Faults:
    """The faults of this rank.

    Attributes:
        faults: those of this rank.
        text: the request for all ranks.
    """

    faults: list[Fault] = field(default_factory=list)
    text: str = ""

    @classmethod
    def of_rank(cls, rank: int, environ: Mapping[str, str] = os.environ) -> Faults:
        """The faults that the environment requests for a rank.

        Raises:
            ConfigError: the variable cannot be parsed.
        """
        texts = [text.strip() for text in environ.get(VARIABLE, "").split(",")]
        faults = [_parse(text) for text in texts if text]
        return cls([fault for fault in faults if fault.rank in (None, rank)], ", ".join(filter(None, texts)))

    def warnings(self) -> list[str]:
        """Lines for the start of a run, so that a variable left in a shell is noticed."""
        asked = f"warning: {VARIABLE} is set, so faults are injected: {self.text}. Unset it unless this is a test."
        return [asked] if self.text else []

    def at(self, place: str, step: int) -> None:
        """Inject the faults of a place.

        Raises:
            OSError: that was requested.
        """
        for fault in list(self.faults):
            if fault.place != place or fault.step not in (None, step):
                continue
            if fault.action in _SIGNALS:
                if fault.step is not None:
                    self.faults.remove(fault)  # a signal is sent once; a step may be repeated after a roll-back
                os.kill(os.getpid(), _SIGNALS[fault.action])
            elif fault.action == "hang":
                end, _ = os.pipe()  # the other end stays open, so nothing ever comes
                os.read(end, 1)
            elif fault.action == "slow":
                time.sleep(fault.value)
            elif fault.action == "wait":
                while Path(fault.file).exists():
                    time.sleep(_POLL_S)
            else:
                number = getattr(errno, fault.action)
                raise OSError(number, os.strerror(number))


def _parse(text: str) -> Fault:
    try:
        rank, step, place, action = text.split(":")
        action, _, value = action.partition("=")
        fault = Fault(
            rank=None if rank == "*" else int(rank),
            step=None if step == "*" else int(step),
            place=place,
            action=action,
            value=float(value or 0) if action == "slow" else 0.0,
            file=value if action == "wait" else "",
        )
    except ValueError:
        raise ConfigError(
            f"{VARIABLE}: {text!r} is no fault", remedy="write RANK:STEP:PLACE:ACTION, or unset the variable"
        ) from None
    if place not in PLACES or action not in ACTIONS:
        raise ConfigError(
            f"{VARIABLE}: there is no {action!r} at {place!r}",
            remedy=f"places are {', '.join(PLACES)}; actions are {', '.join(ACTIONS)}",
        )
    return fault
