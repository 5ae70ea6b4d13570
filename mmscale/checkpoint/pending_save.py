"""A save in progress: its plan, its process and its progress. saving.py decides the next step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmscale.checkpoint.forked import Forked, Send
from mmscale.checkpoint.save_settings import BestCheckpoint
from mmscale.checkpoint.write import WritePlan, Written
from mmscale.errors import MmscaleError


@dataclass
class InlineTask:
    """Work that was done in this process, with the interface of a finished Forked."""

    result: Any = None
    problem: str | None = None
    messages: list[Any] = field(default_factory=list)

    def poll(self) -> bool:
        """Whether it is running."""
        return False

    def wait(self, *, timeout_s: float) -> bool:
        """Whether it has ended."""
        return True

    def kill(self) -> bool:
        """Whether it has ended."""
        return True


@dataclass
class PendingSave:
    """The save in progress."""

    step: int
    number: int
    folder: Path
    plan: WritePlan
    began: float
    best: BestCheckpoint | None = None
    task: Forked | InlineTask | None = None
    phase: Literal["write", "commit"] = "write"
    shortened_s: float = math.inf  # abandon the save after this time, if that is before the deadline
    boundaries: int = 0  # steps trained during the save
    blocked_s: float = 0.0
    written: list[Written] = field(default_factory=list)
    problem: str | None = None


def start(work: Callable[[Send], Any], *, name: str, asynchronous: bool) -> Forked | InlineTask:
    """Begin a part of a save in a forked process, or do it in this one.

    Args:
        work: called with a function that sends a message to the parent.
        name: of the part, for messages.
        asynchronous: in a forked process.
    """
    if asynchronous:
        return Forked(work, name=name)
    task = InlineTask()
    try:
        task.result = work(task.messages.append)
    except OSError as error:
        task.problem = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    except MmscaleError as error:
        task.problem = error.cause
    return task
