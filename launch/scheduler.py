"""Wrappers of SLURM's commands.

Queries SLURM about one job and controls it, through scontrol and scancel. job_table.py queries many jobs at once;
job.py and control.py make the decisions.
"""

from __future__ import annotations

import datetime
import functools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from launch.job_states import Phase, name_of, phase_of
from mmscale.errors import LaunchError

_TIMEOUT_S = 60.0  # scontrol itself gives up on an unreachable slurmctld after 9 to 18 s (22.05)
_FILTERS = ("SQUEUE_", "SACCT_", "SCANCEL_")
_PAUSE_S, _LONGEST_PAUSE_S, _LOOK_S = 1.0, 60.0, 0.2
# Output of SLURM's commands when slurmctld (or munge, or the network) is down. Any other output is an answer.
_NO_ANSWER = re.compile(
    r"Unable to contact slurm controller|Unable to establish control machine|Unexpected message received"
    r"|Could not establish a configuration source|DNS SRV lookup failed|[Ss]ocket timed out|connect failure"
    r"|Connection (refused|reset|timed out)|Zero Bytes were transmitted|in standby mode|[Mm]essage (send|receive) fail"
    r"|Transport endpoint|Resource temporarily unavailable|[Mm]unge|[Aa]uthentication (error|credential)"
)
_WAIT_S, _SETTLED_S = 120.0, 4.0  # SLURM's delay after a requeue, and the part of it that must not be removed


_AWAY = "try again when slurmctld is back (`scontrol ping`); running jobs continue in the meantime"
_Answer = TypeVar("_Answer")


class UnreachableError(LaunchError):
    """SLURM does not answer, so the state of a job is unknown."""


def no_answer(text: str) -> bool:
    """Whether a command of SLURM failed because slurmctld could not be reached."""
    return _NO_ANSWER.search(text) is not None


def with_retries(
    ask: Callable[[], _Answer], *, patience_s: float, give_up: Callable[[], bool] = lambda: False
) -> _Answer:
    """Repeat a query with growing pauses while SLURM does not answer.

    Args:
        ask: one query; raises `UnreachableError` if there is no answer.
        patience_s: how long to repeat it [seconds].
        give_up: polled during the pauses.

    Raises:
        UnreachableError: there was no answer in time, or `give_up` returned true.
        LaunchError: SLURM answered with a refusal.
    """
    deadline, pause, said = time.monotonic() + patience_s, _PAUSE_S, False
    while True:
        try:
            return ask()
        except UnreachableError as error:
            if time.monotonic() + pause > deadline:
                raise
            if not said:
                said = True
                sys.stderr.write(f"{error.cause}; asked again for up to {patience_s:g} s\n")
        until = time.monotonic() + pause
        while time.monotonic() < until:
            if give_up():
                raise UnreachableError("SLURM did not answer before this process was asked to end")
            time.sleep(_LOOK_S)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


@dataclass(frozen=True)
class ExitCode:
    """How a job's batch script ended.

    Attributes:
        status: its exit status.
        signal: number of the signal that ended it; 0: none.
    """

    status: int = 0
    signal: int = 0

    @classmethod
    def parse(cls, text: str) -> ExitCode:
        """From `STATUS:SIGNAL` of scontrol and sacct, or squeue's status of wait(2)."""
        status, colon, number = text.partition(":")
        if not status.strip().isdigit():
            return cls()
        if not colon:
            return cls(int(status) >> 8, int(status) & 0x7F)
        return cls(int(status), int(number) if number.strip().isdigit() else 0)

    def __str__(self) -> str:
        """As a person reads it."""
        if not self.signal:
            return f"exit status {self.status}"
        try:
            return f"killed by {signal.Signals(self.signal).name}"
        except ValueError:  # SLURM's own status, e.g. 125 for a job that ran out of memory
            return f"killed by signal {self.signal}"


@dataclass(frozen=True)
class JobState:
    """One job as SLURM shows it.

    Attributes:
        id: SLURM's number, also of array tasks.
        state: RUNNING, PENDING, ... (job_states.py).
        reason: why it waits; "" if unknown.
        restarts: how often it was requeued.
        nodes: SLURM's host list.
        exit: how its batch script ended.
        start: when it started or will start, as SLURM prints it.
        preempted: whether it has been preempted since it started.
        name: of the job.
        submitted: time of submission, as SLURM prints it; a requeue renews it.
        accounted: the answer is from the accounting, because slurmctld has forgotten the job.
    """

    id: str
    state: str
    reason: str = ""
    restarts: int = 0
    nodes: str = ""
    exit: ExitCode = ExitCode()
    start: str = ""
    preempted: bool = False
    name: str = ""
    submitted: str = ""
    accounted: bool = False

    @property
    def phase(self) -> Phase:
        """Its phase between submission and end."""
        return phase_of(self.state)

    @property
    def ended(self) -> bool:
        """Whether SLURM will not start it again."""
        return self.phase is Phase.ENDED

    @property
    def requeued(self) -> bool:
        """Whether its time of submission may be that of a requeue; the accounting does not count requeues."""
        return self.restarts > 0 or self.accounted

    @property
    def exit_status(self) -> int:
        """Exit status of its batch script."""
        return self.exit.status


def job_state(job: str, *, timeout_s: float = _TIMEOUT_S) -> JobState | None:
    """SLURM's state of a job; None if SLURM does not know it (any more).

    Args:
        job: its id.
        timeout_s: timeout of the query [seconds].

    Raises:
        UnreachableError: SLURM does not answer.
    """
    try:
        text = run(["scontrol", "--oneliner", "show", "job", checked(job)], timeout_s=timeout_s)
    except LaunchError as error:
        if "Invalid job id" in error.cause:
            return None
        raise
    fields = dict(re.findall(r"(?:^|\s)([A-Za-z:/]+)=(\S*)", text.splitlines()[0] if text else ""))
    if "JobState" not in fields:
        return None
    reason = fields.get("Reason", "")
    preempted = fields.get("PreemptTime", "None")  # ISO times, which can be compared as text
    return JobState(
        id=fields.get("JobId", job),
        state=name_of(fields["JobState"]),
        reason="" if reason == "None" else reason,
        restarts=int(fields.get("Restarts", "0")),
        nodes="" if fields.get("NodeList") in (None, "(null)") else fields["NodeList"],
        exit=ExitCode.parse(fields.get("ExitCode", "0:0")),
        start=fields.get("StartTime", ""),
        preempted=preempted[:1].isdigit() and preempted >= fields.get("StartTime", ""),
        name=fields.get("JobName", ""),
        submitted=fields.get("SubmitTime", ""),
    )


@functools.cache
def cluster_name() -> str:
    """Name of the cluster that this machine's commands use.

    Raises:
        UnreachableError: SLURM does not answer.
    """
    found = re.search(r"^ClusterName\s*=\s*(\S+)", run(["scontrol", "show", "config"]), flags=re.MULTILINE)
    return found[1] if found else ""


def lost_nodes(hosts: str) -> dict[str, str]:
    """The failed nodes of a list, with their states; drained nodes do not count.

    Args:
        hosts: as SLURM lists them, e.g. n[1-64].

    Raises:
        UnreachableError: SLURM does not answer.
    """
    if not hosts:
        return {}
    try:
        text = run(["scontrol", "--oneliner", "show", "node", hosts])
    except UnreachableError:
        raise
    except LaunchError:
        return {}
    states = re.findall(r"^NodeName=(\S+) .*?\bState=(\S+)", text, flags=re.MULTILINE)
    # POWERED_DOWN is not DOWN; * marks a node that does not respond.
    return {node: state for node, state in states if re.search(r"(?<![A-Z_])(DOWN|FAIL|NOT_RESPONDING)|\*", state)}


def unknown_nodes(nodes: Sequence[str]) -> list[str]:
    """Nodes that the cluster does not have (any more); sbatch refuses to exclude them."""
    if not nodes:
        return []
    try:
        known = set(run(["sinfo", "--noheader", "--Node", "--format=%N"]).split())
    except LaunchError:
        return []
    return [node for node in nodes if node not in known] if known else []


def partition_limit(partition: str | None) -> int | None:
    """Longest time limit of a partition [minutes]; None if it has no limit or SLURM does not answer.

    Args:
        partition: its name; None: the cluster's default one.
    """
    try:
        lines = run(["scontrol", "--oneliner", "show", "partition", *([partition] if partition else [])]).splitlines()
    except LaunchError:
        return None
    chosen = [line for line in lines if partition or "Default=YES" in line.split()]
    found = re.search(r"\bMaxTime=(?:(\d+)-)?(\d+):(\d+):\d+", chosen[0]) if chosen else None
    if found is None:
        return None
    days, hours, minutes = (int(part or 0) for part in found.groups())
    return days * 1440 + hours * 60 + minutes


def excluded(job: str) -> str:
    """SLURM's list of the nodes that a job must not use; "" for none.

    Raises:
        UnreachableError: SLURM does not answer.
        LaunchError: it does not know the job.
    """
    found = re.search(r"\bExcNodeList=(\S+)", run(["scontrol", "--oneliner", "show", "job", checked(job)]))
    return "" if found is None or found[1] == "(null)" else found[1]


def exclude(job: str, nodes: Sequence[str]) -> None:
    """Replace the list of nodes that a waiting job must not use.

    Raises:
        UnreachableError: SLURM does not answer.
        LaunchError: SLURM refuses, because the job no longer waits.
    """
    run(["scontrol", "update", f"JobId={checked(job)}", f"ExcNodeList={','.join(dict.fromkeys(nodes))}"])


def requeue(job: str) -> None:
    """Requeue a job; it starts again with its batch script.

    Raises:
        UnreachableError: SLURM does not answer.
        LaunchError: SLURM refuses.
    """
    run(["scontrol", "requeue", checked(job)])


def lift_wait(job: str, found: JobState | None = None) -> bool:
    """Let a requeued job start now. SLURM delays it by 120 s under any configuration (22.05).

    The delay is not removed immediately: nodes refuse a start whose credential is not younger than the end of the
    previous one (to a second), and the job becomes FAILED. This happened once in 20 requeues, when this function was
    called in the same second.

    Args:
        job: its id.
        found: SLURM's recent state of the job; None: it is queried.

    Returns:
        Whether there was a delay and SLURM permitted its removal.
    """
    found = found or job_state(job)
    if found is None or found.state != "PENDING" or found.reason != "BeginTime" or found.restarts == 0:
        return False
    try:
        left = datetime.datetime.fromisoformat(found.start) - datetime.datetime.now()
    except ValueError:
        return False
    if left.total_seconds() > _WAIT_S - _SETTLED_S:
        return False
    try:
        run(["scontrol", "update", f"JobId={checked(job)}", "StartTime=now"])
    except LaunchError:
        return False
    return True


def cancel(job: str, *, signal: str | None = None, batch_only: bool = False) -> None:
    """End a job, or send a signal to its steps or to its batch script.

    Raises:
        LaunchError: SLURM refuses.
    """
    command = ["scancel"]
    if signal is not None:
        command.append(f"--signal={signal}")
    if batch_only:
        command.append("--batch")
    run([*command, checked(job)])


def checked(job: str) -> str:
    """A valid job id.

    Raises:
        LaunchError: it is not valid.
    """
    if not re.fullmatch(r"\d+(_\d+)?", job):
        raise LaunchError(f"{job!r} is no job id of SLURM")
    return job


def run(command: Sequence[str], *, timeout_s: float = _TIMEOUT_S) -> str:
    """The output of a SLURM command.

    Raises:
        UnreachableError: slurmctld does not answer.
        LaunchError: it refuses, or the command does not exist on this machine.
    """
    # Shell variables of the user that would change the query, the cluster, or the format of times.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(_FILTERS)}
    try:
        ended = subprocess.run(
            command,
            env=environment | {"SLURM_TIME_FORMAT": "standard"},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise LaunchError(
            f"there is no {command[0]} on this machine", remedy="use a login node of the cluster, or --cluster local"
        ) from None
    except subprocess.TimeoutExpired:
        raise UnreachableError(
            f"SLURM does not answer: {command[0]} said nothing within {timeout_s:g} s", remedy=_AWAY
        ) from None
    if ended.returncode:
        lines = (ended.stderr or ended.stdout).strip().splitlines()
        said = lines[-1] if lines else f"exit status {ended.returncode}"
        if ended.returncode < 0 or no_answer(ended.stderr):  # SIGPIPE: slurmctld ended during its answer
            raise UnreachableError(f"SLURM does not answer: {' '.join(command[:3])}: {said}", remedy=_AWAY)
        raise LaunchError(f"{' '.join(command[:3])}: {said}")
    return ended.stdout
