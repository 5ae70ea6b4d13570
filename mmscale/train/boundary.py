"""The boundary between two steps: requests to stop, the save under way, and a run folder that was renamed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mmscale.checkpoint.manager import CheckpointManager
from mmscale.config import Config
from mmscale.resilience.lease import Fence
from mmscale.resilience.signals import StopRequest
from mmscale.resilience.watchdog import Watchdog
from mmscale.runtime.groups import from_first
from mmscale.train import saves
from mmscale.train.log.records import Records
from mmscale.train.stage_state import StageState
from mmscale.train.throughput import Throughput


class StepBoundary:
    """Called after every step, on every rank; the answer is the same on all of them.

    Args:
        config: of the stage.
        state: gives the step.
        stop: requests to stop.
        checkpoints: of the stage.
        clock: saving is a pause.
        fence: whether this attempt may still write.
        watchdog: is told how long the coming wait may take.
        records: the run's files, and where their folder is.
        is_over: whether nothing is left to train.

    Attributes:
        moved_to: the stage's folder now, once it was renamed.
    """

    def __init__(
        self,
        config: Config,
        *,
        state: StageState,
        stop: StopRequest,
        checkpoints: CheckpointManager,
        clock: Throughput,
        fence: Fence,
        watchdog: Watchdog,
        records: Records,
        is_over: Callable[[], bool],
    ) -> None:
        self.checkpoint = config.checkpoint
        self.state = state
        self.stop = stop
        self.checkpoints = checkpoints
        self.clock = clock
        self.fence = fence
        self.watchdog = watchdog
        self.records = records
        self.is_over = is_over
        self.moved_to: Path | None = None

    def stops(self) -> bool:
        """Whether to stop here."""
        step = self.state.step
        completes = not self.checkpoint.asynchronous and self.checkpoints.due(step)
        waits = self.is_over() or completes or self.checkpoints.saver.waits_before(step)
        # A request to stop is agreed on behind this line, and the save that follows it is waited for too.
        self.watchdog.beat(step, allowed_s=self.checkpoint.deadline if waits else 0.0)
        folder = self.records.folder
        at = None if folder is None else folder.moved()
        stopping, moved = saves.poll_stop_and_save(
            self.stop, self.checkpoints, self.clock, self.fence, moved=at is not None
        )
        if moved:
            self._follow(at)
        if stopping or moved:
            self.checkpoints.saver.hurry(self.stop.grace_s / 2 - self.stop.waited_s)
            self.watchdog.beat(step, allowed_s=self.checkpoint.deadline)
        return stopping or moved

    def _follow(self, at: Path | None) -> None:
        """Save where the folder is now; `at`: as rank 0 has seen it."""
        self.moved_to = from_first(at)
        self.records.tell("run_moved", step=self.state.step, to=str(self.moved_to))
        self.checkpoints.move(self.moved_to)
        self.checkpoints.saver.hurry(0.0)  # what it writes by the old name
