"""States of many jobs.

Queries the states of many jobs at once: one squeue for all of them, one sacct for those that slurmctld has forgotten.
Answers are cached for a while, because `logs --follow` and `status --watch` query repeatedly.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable

from launch import scheduler
from launch.job_states import name_of
from launch.scheduler import ExitCode, JobState
from mmscale.errors import LaunchError

MAX_AGE_S = 30.0  # two requests a minute at most
_COLUMNS = {  # columns of squeue with their widths, because its output has no separators
    "JobArrayID": 40,
    "JobID": 20,
    "State": 24,
    "Reason": 60,
    "RestartCnt": 10,
    "exit_code": 14,
    "StartTime": 24,
    "SubmitTime": 24,
    "PreemptTime": 24,
    "Name": 200,
    "NodeList": 2000,
}
_SACCT = ("JobID", "State", "ExitCode", "NodeList", "Submit", "Start", "JobName")
_MEMORY_SIGNAL = 125  # sacct's ExitCode of a job that ran out of memory


class JobTable:
    """Cached answers of SLURM about jobs.

    Args:
        max_age_s: largest age of an answer [seconds].
    """

    def __init__(self, *, max_age_s: float = MAX_AGE_S) -> None:
        self.max_age_s = max_age_s
        self._found: dict[str, JobState] = {}
        self._asked: frozenset[str] = frozenset()
        self._error: scheduler.UnreachableError | None = None
        self._time = float("-inf")

    def states(self, jobs: Iterable[str]) -> dict[str, JobState]:
        """SLURM's states of some jobs; unknown jobs are omitted.

        Raises:
            UnreachableError: SLURM does not answer, or did not a moment ago.
        """
        wanted = frozenset(jobs)
        if not wanted:
            return {}
        if not wanted <= self._asked or time.monotonic() - self._time >= self.max_age_s:
            self._ask(wanted | self._asked)
        if self._error is not None:
            raise self._error
        return {job: self._found[job] for job in wanted if job in self._found}

    def forget(self) -> None:
        """Query SLURM again the next time."""
        self._time = float("-inf")

    def _ask(self, jobs: frozenset[str]) -> None:
        # A job that has ended is not queried again; slurmctld may forget it.
        ended = {job: state for job, state in self._found.items() if state.ended}
        self._asked, self._error, self._time = jobs, None, time.monotonic()
        try:
            self._found = ended | states_of(jobs - ended.keys())
        except scheduler.UnreachableError as error:
            self._error = error


def states_of(jobs: Iterable[str]) -> dict[str, JobState]:
    """Query slurmctld, then the accounting for jobs that slurmctld does not know.

    Raises:
        UnreachableError: slurmctld does not answer.
    """
    wanted = sorted({scheduler.checked(job) for job in jobs})
    if not wanted:
        return {}
    found = {job: state for job, state in _squeue(wanted).items() if job in wanted}
    if missing := [job for job in wanted if job not in found]:
        found |= _sacct(missing)
    return found


def _squeue(jobs: list[str]) -> dict[str, JobState]:
    layout = ",".join(f"{name}:{width}" for name, width in _COLUMNS.items())
    command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(jobs)}", f"--Format={layout}"]
    try:
        text = scheduler.run(command)
    except scheduler.UnreachableError:
        raise
    except LaunchError as error:
        # The error for a single unknown job; with several, unknown ones are omitted.
        if "Invalid job id" in error.cause:
            return {}
        raise
    found = {}
    for line in text.splitlines():
        fields, place = {}, 0
        for name, width in _COLUMNS.items():
            fields[name] = line[place : place + width].strip()
            place += width
        # A task of an array knows only its plain number from inside its job.
        found[fields["JobArrayID"]] = found[fields["JobID"]] = _of_squeue(fields)
    return found


def _of_squeue(fields: dict[str, str]) -> JobState:
    preempted, start = fields["PreemptTime"], fields["StartTime"]
    return JobState(
        id=fields["JobArrayID"],
        state=name_of(fields["State"]),
        reason="" if fields["Reason"] == "None" else fields["Reason"],
        restarts=int(fields["RestartCnt"] or 0),
        nodes=fields["NodeList"],
        exit=ExitCode.parse(fields["exit_code"]),
        start="" if start == "N/A" else start,
        preempted=preempted[:1].isdigit() and preempted >= start,
        name=fields["Name"],
        submitted=fields["SubmitTime"],
    )


def _sacct(jobs: list[str]) -> dict[str, JobState]:
    """States from the accounting; empty if the site has none."""
    if shutil.which("sacct") is None:
        return {}
    command = ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(jobs)}"]
    try:
        text = scheduler.run([*command, f"--format={','.join(_SACCT)}"])
    except LaunchError:
        return {}
    found = {}
    for line in text.splitlines():
        values = line.split("|", len(_SACCT) - 1)
        if len(values) < len(_SACCT) or values[0] not in jobs:
            continue
        fields = dict(zip(_SACCT, values, strict=True))
        exit_code = ExitCode.parse(fields["ExitCode"])
        state = "OUT_OF_MEMORY" if exit_code.signal == _MEMORY_SIGNAL else name_of(fields["State"])
        found[values[0]] = JobState(
            id=values[0],
            state=state,
            nodes="" if fields["NodeList"] == "None assigned" else fields["NodeList"],
            exit=exit_code,
            start=fields["Start"],
            name=fields["JobName"],
            submitted=fields["Submit"],
            accounted=True,
        )
    return found
