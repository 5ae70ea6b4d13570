"""The processes of an attempt's ranks (srun, or the local launcher).

Starts the ranks of an attempt, waits for them and asks them to save. job.py decides what to do after their end.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from launch import agent
from launch import srun_step as step
from launch.disk import Disk
from launch.profile import Profile
from launch.record import Record
from launch.start_watch import StartWatch
from mmscale.resilience import lease
from mmscale.runs.events import EventLog
from mmscale.runs.run_progress import RunProgress

_POLL_S = 0.1
# Interval in which a request to save is repeated, because ranks may not have been able to handle the first one.
_REPEAT_S = 5.0
_STATUSES_S = 1.0  # interval of polls for statuses that were withheld from agents; lists a folder that all nodes share
_PROGRESS_S = 30.0  # interval in which the run's progress is stored
_FIRST_LOOK_S = 10.0  # time of the first check for a preemption after ranks were started
# Time for the others to end after one rank has reported a status that a restart would not change; as srun's --wait.
_OTHERS_S = 60.0


class RankProcesses:
    """Starts ranks and waits for their end.

    Args:
        record: of the launch.
        profile: how ranks are started.
        disk: writes the file with the run's progress.
        stopping: whether the job was asked to stop.
        look_for_preemption: queries SLURM once, after ranks were started, whether the job was preempted before.
        say: prints a line in the job's log.
    """

    def __init__(
        self,
        record: Record,
        profile: Profile,
        disk: Disk,
        *,
        stopping: Callable[[], bool],
        look_for_preemption: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self.cwd, self.run_dir = record.cwd, Path(record.run)
        self.profile, self.disk = profile, disk
        self.slurm = profile.scheduler == "slurm"
        self.stopping, self.look_for_preemption, self.say = stopping, look_for_preemption, say
        self._progress: RunProgress | None = None
        self._ranks: subprocess.Popen[bytes] | None = None
        self._sent = 0.0

    def run(
        self, command: list[str], environment: dict[str, str], logs: Path, fence: lease.Fence, events: EventLog
    ) -> int:
        """Start the ranks, pass requests on to them and wait for their end; returns their exit status."""
        self._ranks = step.start(command, environment, cwd=self.cwd, logs=logs, slurm=self.slurm)
        self._sent = 0.0
        waits_until = float("inf")
        look_at = time.monotonic() + _FIRST_LOOK_S if self.slurm else float("inf")
        note_at = time.monotonic() + _PROGRESS_S
        beginning = StartWatch(self.run_dir, events.attempt, hint_after_s=self.profile.start_hint_after)
        list_at = 0.0 if self.profile.ranks == "torchrun" else float("inf")
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = self._ranks.wait(_POLL_S)
                    return agent.true_status(logs, status if status >= 0 else 128 - status)
                if time.monotonic() >= list_at:
                    list_at = time.monotonic() + _STATUSES_S
                    kept = bool(agent.statuses(logs))  # a rank that starts again removes its own status
                    waits_until = min(waits_until, time.monotonic() + _OTHERS_S) if kept else float("inf")
                if time.monotonic() > waits_until:
                    # agents would restart the other ranks repeatedly, without the first one
                    return agent.true_status(logs, 1)
                if time.monotonic() >= note_at:
                    note_at = time.monotonic() + _PROGRESS_S
                    self.note_progress(fence)
                if time.monotonic() > look_at:  # by now the step exists and receives signals
                    look_at = float("inf")
                    self.look_for_preemption()
                fence.check_if_due()
                beginning.hint_if_late(events, where=environment.get("MASTER_PORT", ""))
                if self.stopping():
                    if beginning.ignores_stop():
                        self.say("the ranks have not begun, and do not hear the request to end: killed")
                        return 128 + signal.SIGKILL
                    self._ask_to_save()
        finally:
            if self._ranks.poll() is None:
                self._ranks.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._ranks.wait(5.0)
                self._ranks.kill()
                self._ranks.wait()

    def note_progress(self, fence: lease.Fence) -> None:
        """Store the progress of the run, so that `mmscale status` need not read metrics.jsonl from its beginning."""
        if self._progress is None:
            self._progress = RunProgress.load(self.run_dir)
        if self._progress.update(self.run_dir):
            fence.check()
            self.disk.write(*self._progress.file(self.run_dir))

    def _ask_to_save(self) -> None:
        now = time.monotonic()
        if self._ranks is not None and now - self._sent >= _REPEAT_S:
            self._sent = now
            self._ranks.send_signal(signal.SIGUSR2)  # srun and the local launcher forward it to every rank
