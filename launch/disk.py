# What a job writes into the run's folder, on a disk that may refuse: small files wait in memory, and what has to be
# there before ranks start is tried again for a while. When something is written, job.py decides.
"""A job and its disk."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from launch import budget as budgets
from launch.policy import Budget
from mmscale.checkpoint.layout import Store
from mmscale.errors import SaveError
from mmscale.runtime.disk_writer import DiskWriter, replacing
from mmscale.runtime.held_folder import HeldFolder
from mmscale.train.metrics import EventLog

_PATIENCE_S = 1800.0  # as the profile's slurm_patience
_AGAIN_S = 2.0
T = TypeVar("T")
L = TypeVar("L", bound=EventLog)


class Disk:
    """The files of a job.

    Args:
        run: folder of the run.
        folder: of the launch.
        give_up: whether nobody waits any more for what the disk refuses.

    Attributes:
        writer: of all of them.
    """

    def __init__(self, run: Path, folder: Path, *, give_up: Callable[[], bool]) -> None:
        self.run = run
        self.folder = folder
        self._give_up = give_up
        self.writer = DiskWriter(str(run))
        self._budget: Budget | None = None  # as it is on the disk, or will be
        self._held: HeldFolder | None = None

    def patiently(self, action: Callable[[], T]) -> T:
        """Do something that has to be done before ranks start; again for a while if the disk refuses it.

        Raises:
            SaveError: the disk has refused for half an hour, or nobody waits any more.
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
                        remedy="make room or mount it again, then `mmscale resume`",
                    ) from None
                if not said:
                    sys.stderr.write(f"{self.run} cannot be written: {reason}; tried again for {_PATIENCE_S:g} s\n")
                    said = True
            time.sleep(_AGAIN_S)

    def place(self) -> Path:
        """The run's folder by a path that leads there although it is renamed."""
        if self._held is None:
            self._held = HeldFolder(self.run)
        return self._held.stable

    def noted(self, events: L) -> L:
        """Have outages of the disk become events from now on."""
        self.writer.on_change = events.add
        return events

    def now(self, path: Path) -> Path:
        """A path below the run's folder, which leads there although that was renamed since ranks were started."""
        held = self._held is not None and path.is_relative_to(self.run)
        return self._held.stable / path.relative_to(self.run) if self._held is not None and held else path

    def write(self, file: Path, content: bytes) -> None:
        """Give a file its content, whole or not at all; later, if the disk refuses it now."""
        self.writer.submit(replacing(self.now(file), content), size=len(content), key=str(file))

    def budget(self) -> Budget:
        """Restarts so far, also those that the disk has refused to note."""
        known = self._budget or budgets.load(self.folder)
        return known or Budget(step=max(Store.of_run(self.run).steps(), default=0))

    def first_start(self) -> bool:
        """Whether no job of this launch has noted a budget yet."""
        return self._budget is None and budgets.load(self.folder) is None

    def keep(self, budget: Budget) -> None:
        """Remember a budget."""
        self._budget = budget
        self.write(*budgets.file_of(self.folder, budget))

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()
        if self._held is not None:
            self._held.close()
