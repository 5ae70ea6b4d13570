"""Records a window of steps with torch's profiler (`log.profile`): a Chrome trace for each recorded rank.

A file that cannot be written is a warning and never ends a run.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from torch.profiler import ProfilerActivity, profile, record_function

from mmscale.config import Config
from mmscale.runtime import device
from mmscale.runtime.groups import gathered
from mmscale.train.stage_state import StageState
from mmscale.train.steps.step_report import StepReport
from mmscale.train.throughput import Throughput

FOLDER = "profile"
_log = logging.getLogger(__name__)


def trace_name(*, attempt: int, rank: int, first: int, last: int) -> str:
    """Name of the trace file of a rank in an attempt, with its first and last recorded step."""
    return f"attempt_{attempt}_rank_{rank}_steps_{first}-{last}.json.gz"


class ProfileWindow:
    """A hook that records steps; it must be entered right before the first step of an attempt.

    An attempt that resumes within the window records the rest of it; one that resumes after it records nothing. A
    window that a stop interrupts, or that a roll-back repeats, is written once, with the steps recorded so far.

    At the end of a window all ranks wait for those that write: rank 0 measures the run's speed, and would count the
    seconds of another rank's write as a slow step. An attempt that ends within a window does not wait, as it may end
    with an error on one rank.

    Args:
        config: `log.profile`.
        folder: of the stage.
        attempt: its number.
        rank: of this process.
        next_step: the first step of this attempt.
        clock: measures the writing of a trace as a pause, not as a part of the step time.
        on_event: writes events, on rank 0.
        beat: reports progress to the hang watchdog, before and after the write.
    """

    def __init__(
        self,
        config: Config,
        *,
        folder: Path,
        attempt: int,
        rank: int,
        next_step: int,
        clock: Throughput,
        on_event: Callable[..., None],
        beat: Callable[[], None],
    ) -> None:
        self._folder, self._attempt, self._rank = folder / FOLDER, attempt, rank
        self._clock, self._on_event, self._beat = clock, on_event, beat
        window = config.log.profile
        self._ranks = () if window is None else window.ranks
        self._steps = range(0) if window is None else range(window.start, window.start + window.steps)
        self._next = next_step
        self._first = 0  # first recorded step; 0: the window has not begun
        self._profiler: Any = None
        self._step: Any = None  # annotates the step in the trace

    def __enter__(self) -> Self:
        if self._next in self._steps:
            self._begin(self._next)
        return self

    def __exit__(self, *_: object) -> None:
        if self._first:
            self._end(self._next - 1)

    def on_step(self, state: StageState, report: StepReport) -> None:
        """Start recording before the first step of the window, and stop after the last one."""
        self._next = report.step + 1
        if self._first and self._next not in self._steps:
            self._beat()
            with self._clock.measure("profile_s"):
                self._end(report.step)
                gathered(None)
            self._beat()
        elif not self._first and self._next in self._steps:
            self._begin(self._next)
        elif self._step is not None:
            self._name_step()

    def _begin(self, step: int) -> None:
        self._first = step
        if self._rank not in self._ranks:
            return
        activities = [ProfilerActivity.CPU]
        if device.taken().type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities)
        self._profiler.start()
        self._name_step()

    def _name_step(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
        self._step = record_function(f"step {self._next}")
        self._step.__enter__()

    def _end(self, last: int) -> None:
        first, self._first, self._steps = self._first, 0, range(0)
        if last < first:
            self._discard()
            return
        if self._rank in self._ranks:
            self._write(first, last)
        self._on_event("profile", step=last, first=first, ranks=list(self._ranks), folder=str(self._folder))

    def _write(self, first: int, last: int) -> None:
        file = self._folder / trace_name(attempt=self._attempt, rank=self._rank, first=first, last=last)
        profiler = self._stop()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(file))
        except (OSError, RuntimeError) as error:
            _log.warning("the profile of steps %d to %d was not written: %s", first, last, error)

    def _discard(self) -> None:
        if self._profiler is not None:
            self._stop()

    def _stop(self) -> Any:
        profiler, self._profiler = self._profiler, None
        self._step.__exit__(None, None, None)
        self._step = None
        with contextlib.suppress(RuntimeError):  # the profiler may be unusable if the attempt ends with an error
            profiler.stop()
        return profiler
