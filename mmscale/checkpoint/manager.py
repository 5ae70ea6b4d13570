"""When to save, what to keep, what to load: the checkpoints of one run, committed by rename, newest first.

Synchronous. What the state consists of, it is told; where it stands, layout.py says.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from mmscale.checkpoint import sharded
from mmscale.checkpoint.layout import Store


class Saveable(Protocol):
    """State that can become a sharded state dict and back."""

    step: int

    def sharded(self, *, loading: bool) -> dict[str, Any]:
        """This rank's part."""

    def restore(self, loaded: dict[str, Any]) -> None:
        """Take over what was read."""


class CheckpointManager:
    """The checkpoints of a run; every rank holds one and calls it at the same steps.

    Args:
        run: the run's folder.
        every: save every n steps; 0: only when told.
        keep: newest checkpoints kept.
        attempt: number of this attempt; names temporary folders.
        info: what is stored beside the tensors, plain JSON.
        on_event: told "save_begin" and "save_committed" with the step, on rank 0.
    """

    def __init__(
        self,
        run: Path,
        *,
        every: int,
        keep: int,
        attempt: int,
        info: dict[str, Any],
        on_event: Callable[[str, int], None],
    ) -> None:
        self.store = Store.of_run(run)
        self.every = every
        self.keep = keep
        self.attempt = attempt
        self.info = info
        self.on_event = on_event
        self._first = torch.distributed.get_rank() == 0

    def due(self, step: int) -> bool:
        """Whether the schedule asks for a checkpoint after this step."""
        return self.every > 0 and step % self.every == 0

    def save(self, state: Saveable) -> None:
        """Write, commit, and delete the oldest ones."""
        step = state.step
        if self._first:
            self.on_event("save_begin", step)
            self.store.begin(step, self.attempt)
        torch.distributed.barrier()  # the folder is there
        sharded.write(self.store.temporary(step, self.attempt), state.sharded(loading=False))
        torch.distributed.barrier()  # every rank has written
        if self._first:
            self.store.commit(step, self.attempt, self.info | {"step": step})
            self.store.prune(self.keep)
            self.on_event("save_committed", step)

    def load(self, state: Saveable, step: int) -> None:
        """Read a committed checkpoint into the state."""
        state.restore(sharded.read(self.store.path(step), state.sharded(loading=True)))
