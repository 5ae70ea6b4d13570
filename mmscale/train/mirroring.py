"""The mirror of a stage's checkpoints during training: which rank uploads, when, and how long the end waits for it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from mmscale.checkpoint.mirror.mirror_settings import MirrorSettings
from mmscale.checkpoint.mirror.upload_process import UploadProcess
from mmscale.resilience.signals import StopRequest
from mmscale.runtime.groups import from_first
from mmscale.train.stage_state import StageState
from mmscale.train.stages.built import StageInputs
from mmscale.train.steps.step_report import StepReport

_LOOK_S = 1.0  # rank 0 polls in this interval while all ranks wait


class Mirroring:
    """Uploads during one attempt. Every rank has one; rank 0 starts the uploading process. A hook; saves notify it.

    Args:
        given: the stage.
        stop: stop requests.
        on_event: writes events, on rank 0.
        say: prints warnings.
    """

    def __init__(
        self, given: StageInputs, *, stop: StopRequest, on_event: Callable[..., None], say: Callable[[str], None]
    ) -> None:
        self.stop = stop
        self.wait_s = given.settings.checkpoint.mirror_wait
        settings = MirrorSettings.of_stage(given.settings, run=given.run, folder=given.folder)
        self.is_on = settings is not None
        first = given.env.is_first
        self.process = None if settings is None or not first else UploadProcess(settings, on_event=on_event, warn=say)

    def request_upload(self) -> None:
        """Check for checkpoints to upload: one was committed, or the mirror may lack one."""
        if self.process is not None:
            self.process.request_upload()

    def on_step(self, state: StageState, report: StepReport) -> None:
        """Pass on the messages of the uploading process."""
        if self.process is not None:
            self.process.poll()

    def wait(self, *, finished: bool) -> None:
        """Wait for the upload of the last checkpoint; every rank calls it, and all return together.

        Args:
            finished: nothing is left to train. Otherwise it uses at most half of the time that a stop request leaves.
        """
        if not self.is_on:
            return
        left = self.wait_s if finished else min(self.wait_s, self.stop.grace_s / 2 - self.stop.waited_s)
        until = time.monotonic() + left
        if self.process is not None:
            self.process.finish()
        while from_first(self._wait_for_uploads(until, interruptible=finished)):
            pass

    def _wait_for_uploads(self, until: float, *, interruptible: bool) -> bool:
        """Pause, then return whether to wait longer; on rank 0."""
        if self.process is None:
            return False
        pause_until = min(until, time.monotonic() + _LOOK_S)
        while self.process.busy and time.monotonic() < pause_until:
            time.sleep(0.05)
        return self.process.busy and time.monotonic() < until and not (interruptible and self.stop.name is not None)


@contextlib.contextmanager
def mirroring(
    given: StageInputs, *, stop: StopRequest, on_event: Callable[..., None], say: Callable[[str], None]
) -> Iterator[Mirroring]:
    """The mirror of an attempt; its process ends with the context."""
    made = Mirroring(given, stop=stop, on_event=on_event, say=say)
    try:
        yield made
    finally:
        if made.process is not None:
            made.process.close()
