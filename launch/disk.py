"""Writes a job's files to a disk that may fail.

Files that a job writes into the run's folder, on a disk that may fail. Small files wait in memory; files needed before
ranks start are retried for a while. job.py decides when something is written.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from launch import budget as budgets
from launch.policy import Budget, Ending, crashed
from mmscale.checkpoint.layout import Store
from mmscale.errors import SaveError, shell_command
from mmscale.runs.events import EventLog
from mmscale.runtime.disk_writer import DiskWriter, replacing
from mmscale.runtime.open_folder import OpenFolder

_PATIENCE_S = 1800.0  # same as the profile's slurm_patience
_AGAIN_S = 2.0
T = TypeVar("T")
L = TypeVar("L", bound=EventLog)


class Disk:
    """The files of a job.

    Args:
        run: folder of the run.
        folder: of the launch.
        give_up: whether to stop waiting for the disk.

    Attributes:
        writer: writes all of them.
    """

    def __init__(self, run: Path, folder: Path, *, give_up: Callable[[], bool]) -> None:
        self.run = run
        self.folder = folder
        self._give_up = give_up
        self.writer = DiskWriter(str(run))
        self._budget: Budget | None = None  # as on the disk, now or when the writer has caught up
        self._held: OpenFolder | None = None

    def with_retries(self, action: Callable[[], T]) -> T:
        """Run an action that must succeed before ranks start; retry for a while if the disk fails.

        Raises:
            SaveError: the disk has failed for half an hour, or `give_up` returned true.
        """
        until, said = time.monotonic() + _PATIENCE_S, False
        while True:
            try:
                return action()
            except OSError as error:
                reason = error.strerror or str(error)
                if self._give_up() or time.monotonic() > until:
                    raise SaveError(
                        f"{self.run} cannot be written: {reason}",
                        remedy=f"make room or mount it again, then {shell_command('resume', self.run)}",
                    ) from None
                if not said:
                    sys.stderr.write(f"{self.run} cannot be written: {reason}; tried again for {_PATIENCE_S:g} s\n")
                    said = True
            time.sleep(_AGAIN_S)

    def place(self) -> Path:
        """The run's folder, by a path that stays valid if the folder is renamed."""
        if self._held is None:
            self._held = OpenFolder(self.run)
        return self._held.stable

    def noted(self, events: L) -> L:
        """Record outages of the disk as events from now on."""
        self.writer.on_change = events.add
        return events

    def now(self, path: Path) -> Path:
        """A path below the run's folder that stays valid if the folder was renamed since ranks started."""
        held = self._held is not None and path.is_relative_to(self.run)
        return self._held.stable / path.relative_to(self.run) if self._held is not None and held else path

    def write(self, file: Path, content: bytes) -> None:
        """Write a file atomically; later, if the disk fails now."""
        self.writer.submit(replacing(self.now(file), content), size=len(content), key=str(file))

    def budget(self) -> Budget:
        """Restarts so far, including those that could not be stored."""
        known = self._budget or budgets.load(self.folder)
        return known or Budget(step=max(Store.of_run(self.run).steps(), default=0))

    def first_start(self) -> bool:
        """Whether no job of this launch has stored a budget yet."""
        return self._budget is None and budgets.load(self.folder) is None

    def count(self, ending: Ending, before: Budget) -> Budget:
        """Store and return the budget after an end of ranks, given the budget before it."""
        step = max(Store.of_run(self.run).steps(), default=0)
        budget = before.ended(step=step, crashed=crashed(ending), requeue_counts=ending.requeue_counts)
        self.keep(budget)
        return budget

    def keep(self, budget: Budget) -> None:
        """Store a budget."""
        self._budget = budget
        self.write(*budgets.file_of(self.folder, budget))

    def close(self) -> None:
        """Write everything that is still pending."""
        self.writer.close()
        if self._held is not None:
            self._held.close()
