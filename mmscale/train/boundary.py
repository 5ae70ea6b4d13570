"""The boundary between two steps: handles stop requests, the save in progress, and a run folder that was renamed."""

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
from mmscale.train.log.run_logs import RunLogs
from mmscale.train.stage_state import StageState
from mmscale.train.throughput import Throughput


class StepBoundary:
    """Called after every step, on every rank; returns the same answer on all of them.

    Args:
        config: of the stage.
        state: has the step.
        stop: stop requests.
        checkpoints: of the stage.
        clock: measures the pause for saving.
        fence: whether this attempt may still write.
        watchdog: receives the time limit of the coming wait.
        logs: the run's files and their folder.
        is_over: whether nothing is left to train.

    Attributes:
        moved_to: the stage's present folder, after it was renamed.
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
        logs: RunLogs,
        is_over: Callable[[], bool],
    ) -> None:
        self.checkpoint = config.checkpoint
        self.state = state
        self.stop = stop
        self.checkpoints = checkpoints
        self.clock = clock
        self.fence = fence
        self.watchdog = watchdog
        self.logs = logs
        self.is_over = is_over
        self.moved_to: Path | None = None

    def stops(self) -> bool:
        """Whether to stop at this boundary."""
        step = self.state.step
        completes = not self.checkpoint.asynchronous and self.checkpoints.due(step)
        waits = self.is_over() or completes or self.checkpoints.saver.waits_before(step)
        # Ranks agree on a stop request below, and then also wait for the save that follows it.
        self.watchdog.beat(step, allowed_s=self.checkpoint.deadline if waits else 0.0)
        folder = self.logs.folder
        at = None if folder is None else folder.moved()
        stopping, moved = saves.poll_stop_and_save(
            self.stop, self.checkpoints, self.clock, self.fence, moved=at is not None
        )
        if moved:
            self._follow(at)
        if stopping or moved:
            self.checkpoints.saver.shorten_deadline(self.stop.grace_s / 2 - self.stop.waited_s)
            self.watchdog.beat(step, allowed_s=self.checkpoint.deadline)
        return stopping or moved

    def _follow(self, at: Path | None) -> None:
        """Save in the renamed folder; `at` is its present path as found by rank 0."""
        self.moved_to = from_first(at)
        self.logs.add_event("run_moved", step=self.state.step, to=str(self.moved_to))
        self.checkpoints.move(self.moved_to)
        self.checkpoints.saver.shorten_deadline(0.0)  # finish the save that uses the old path
