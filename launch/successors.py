"""Successor jobs.

Jobs of a launch that take over the run when the job before them ends: submitted in advance (`chain` of the profile), or
by a job whose nodes are unfit. SLURM starts them (afterany); the run's lease decides which job trains.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launch import batch_script, job_table, scheduler
from launch import record as records
from launch.policy import FINAL, GAVE_UP, STOPPED
from launch.profile import Profile
from launch.record import JobKey, Record
from mmscale.errors import LaunchError
from mmscale.runs.events import read_events


def submit(record: Record, profile: Profile, task: Callable[[], None], *, exclude: Sequence[str]) -> str:
    """Submit one more job of a launch, which starts when the launch's last job has ended.

    Args:
        record: of the launch.
        profile: of the cluster.
        task: object that submitit pickles for it.
        exclude: nodes that must not be used.

    Returns:
        Its number.

    Raises:
        UnreachableError: SLURM does not answer.
        LaunchError: SLURM refuses.
    """
    folder = Path(record.folder)
    last = records.keys_of(folder)[-1].id
    chosen = batch_script.executor([record], profile, dependency=f"afterany:{last}", exclude=exclude)
    (taken,) = batch_script.submit(chosen, [task], profile)
    records.add_job(folder, JobKey(taken.id), log=taken.log)  # stored at once, so that the number is not lost
    records.add_job(folder, batch_script.keys([taken.id])[0], log=taken.log)
    return taken.id


class Successors:
    """The other jobs of a launch, from the view of the training job.

    Args:
        record: of the launch.
        profile: of the cluster.
        job: SLURM's number of the training job; "" without SLURM, and then there are no others.
    """

    def __init__(self, record: Record, profile: Profile, job: str) -> None:
        self._record = record
        self._profile = profile
        self._job = job
        self._folder = Path(record.folder)

    def alive(self) -> list[str]:
        """Numbers of the other jobs that run or wait; all submitted jobs if SLURM does not answer."""
        others = self._others()
        if not others:
            return []
        try:
            states = job_table.states_of(key.id for key in others)
        except LaunchError:
            return [key.id for key in others]
        found = ((key, states.get(key.id)) for key in others)
        return [key.id for key, state in found if state is not None and key.is_job(state) and not state.ended]

    def cancel(self) -> None:
        """Cancel the waiting jobs, because the run is over. One that starts anyway detects that (`end_of_run`)."""
        for number in reversed(self.alive()):
            try:
                scheduler.cancel(number)
            except LaunchError as error:
                sys.stderr.write(f"job {number}, which was to continue, is not cancelled: {error.cause}\n")

    def without(self, unfit: Sequence[str], task: Callable[[], None]) -> str:
        """Continue the run elsewhere: exclude nodes from the waiting jobs, or submit a new job that excludes them.

        Args:
            unfit: nodes with a fault of their own.
            task: object that submitit pickles for a new job.

        Returns:
            Number of the job that continues; "" if there is none.
        """
        submitted = len(records.keys_of(self._folder))
        if not self._job or not unfit or not records.can_submit_again(self._folder):
            return ""
        try:
            waiting = self.alive()
            for number in waiting:
                scheduler.exclude(number, [*_list(scheduler.excluded(number)), *unfit])
            if waiting or submitted >= self._profile.chain + self._profile.replacements:
                return next(iter(waiting), "")
            before = _list(scheduler.excluded(self._job))
            return submit(self._record, self._profile, task, exclude=list(dict.fromkeys([*before, *unfit])))
        except LaunchError as error:
            sys.stderr.write(f"no job continues without {', '.join(unfit)}: {error.cause}\n")
            return ""

    def end_of_run(self) -> int | None:
        """Exit status for a job that starts after the run has ended for good; None: it has not ended.

        Another job of the launch has ended it; or an earlier start of this job has reached the last step: SLURM 24.11
        starts a job that was preempted and requeued once more when it has completed. After every other end of its own a
        person may have requeued this job. It trains then, unless a stop of the launch was requested, which the
        supervisor notices by itself.
        """
        if not self._job or not records.keys_of(self._folder):
            return None
        mine: list[dict[str, Any]] = []
        for event in read_events(Path(self._record.run)):
            if event["event"] == "launch" and not event.get("in_place"):  # agents do not begin another launch
                mine = [event] if event.get("launch") == self._folder.name else []
            elif mine:
                mine.append(event)
        last: dict[str, Any] = next((event for event in reversed(mine) if event["event"] == "ranks_ended"), {})
        if not mine or not last.get("over"):
            return None
        if mine[0].get("job") == self._job:
            return 0 if last.get("status") == 0 else None
        if last.get("action") == "give_up":
            return GAVE_UP
        return int(last["status"]) if last.get("unsaved") or last.get("status") in (0, *FINAL) else STOPPED

    def took_over(self, job: str) -> bool:
        """Whether a job is an earlier one of this launch."""
        return any(key.id == job for key in self._others())

    def _others(self) -> list[JobKey]:
        array, task = os.environ.get("SLURM_ARRAY_JOB_ID", ""), os.environ.get("SLURM_ARRAY_TASK_ID", "")
        own = {self._job, f"{array}_{task}"}
        return [key for key in records.keys_of(self._folder) if key.id not in own] if self._job else []


def _list(hosts: str) -> list[str]:
    return [hosts] if hosts else []
