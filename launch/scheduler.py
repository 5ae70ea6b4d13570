# Asks SLURM about one job and has it do things, through scontrol and scancel. Many jobs at once: job_table.py.
# It decides nothing: job.py and control.py do.
"""SLURM's commands."""

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

_TIMEOUT_S = 60.0  # scontrol gives an unreachable slurmctld up by itself after 9 to 18 s (22.05)
_FILTERS = ("SQUEUE_", "SACCT_", "SCANCEL_")
_PAUSE_S, _LONGEST_PAUSE_S, _LOOK_S = 1.0, 60.0, 0.2
# What SLURM's commands print when slurmctld (or munge, or the network) is away. Anything else is an answer.
_NO_ANSWER = re.compile(
    r"Unable to contact slurm controller|Unable to establish control machine|Unexpected message received"
    r"|Could not establish a configuration source|DNS SRV lookup failed|[Ss]ocket timed out|connect failure"
    r"|Connection (refused|reset|timed out)|Zero Bytes were transmitted|in standby mode|[Mm]essage (send|receive) fail"
    r"|Transport endpoint|Resource temporarily unavailable|[Mm]unge|[Aa]uthentication (error|credential)"
)
_WAIT_S, _SETTLED_S = 120.0, 4.0  # SLURM's wait after a requeue, and the part of it that must not be lifted


_AWAY = "try again when slurmctld is back (`scontrol ping`); running jobs go on meanwhile"
_Answer = TypeVar("_Answer")


class UnreachableError(LaunchError):
    """SLURM does not answer: nothing is known of a job, and nothing follows from that."""


def no_answer(text: str) -> bool:
    """Whether a command of SLURM failed because slurmctld could not be reached."""
    return _NO_ANSWER.search(text) is not None


def patiently(ask: Callable[[], _Answer], *, patience_s: float, give_up: Callable[[], bool] = lambda: False) -> _Answer:
    """Ask SLURM, again and again with growing pauses while it does not answer.

    Args:
        ask: one question; raises `UnreachableError` when there is no answer.
        patience_s: how long [seconds].
        give_up: looked at during the pauses.

    Raises:
        UnreachableError: there was no answer in time, or `give_up` said so.
        LaunchError: SLURM answered, and refuses.
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
        except ValueError:  # SLURM's own, e.g. 125 for a job that ran out of memory
            return f"killed by signal {self.signal}"


@dataclass(frozen=True)
class JobState:
    """One job as SLURM shows it.

    Attributes:
        id: as SLURM numbers it, array tasks too.
        state: RUNNING, PENDING, ... (job_states.py).
        reason: why it waits; "" if nobody says.
        restarts: how often it was requeued.
        nodes: SLURM's host list.
        exit: how its batch script ended.
        start: when it started or will start, as SLURM prints it.
        preempted: whether it has been asked to make room since it started.
        name: of the job.
        submitted: when, as SLURM prints it; a requeue sets it anew.
        accounted: it is the accounting's answer; slurmctld knows the job no more.
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
        """Where it is on its way."""
        return phase_of(self.state)

    @property
    def ended(self) -> bool:
        """Whether it does not come back by itself."""
        return self.phase is Phase.ENDED

    @property
    def requeued(self) -> bool:
        """Whether its time of submission may be that of a requeue: the accounting does not count them."""
        return self.restarts > 0 or self.accounted

    @property
    def exit_status(self) -> int:
        """Exit status of its batch script."""
        return self.exit.status


def job_state(job: str, *, timeout_s: float = _TIMEOUT_S) -> JobState | None:
    """What SLURM says of a job; None if it does not know it (any more).

    Args:
        job: its id.
        timeout_s: how long SLURM has for an answer [seconds].

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
    preempted = fields.get("PreemptTime", "None")  # ISO times, which compare as text
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
    """Name of the cluster that this machine's commands talk to.

    Raises:
        UnreachableError: SLURM does not answer.
    """
    found = re.search(r"^ClusterName\s*=\s*(\S+)", run(["scontrol", "show", "config"]), flags=re.MULTILINE)
    return found[1] if found else ""


def lost_nodes(hosts: str) -> dict[str, str]:
    """Those of some nodes that have failed, with their state; not those that a person keeps jobs away from (DRAIN).

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
    # POWERED_DOWN is not DOWN; * marks a node that does not answer.
    return {node: state for node, state in states if re.search(r"(?<![A-Z_])(DOWN|FAIL|NOT_RESPONDING)|\*", state)}


def unknown_nodes(nodes: Sequence[str]) -> list[str]:
    """Those of some nodes that the cluster does not have (any more): sbatch refuses to exclude them."""
    if not nodes:
        return []
    try:
        known = set(run(["sinfo", "--noheader", "--Node", "--format=%N"]).split())
    except LaunchError:
        return []
    return [node for node in nodes if node not in known] if known else []


def partition_limit(partition: str | None) -> int | None:
    """Longest time that jobs of a partition may ask for [minutes]; None: it has no limit, or nobody answers.

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
    """Have a waiting job not use some nodes, instead of those that it was told before.

    Raises:
        UnreachableError: SLURM does not answer.
        LaunchError: it refuses: the job does not wait any more.
    """
    run(["scontrol", "update", f"JobId={checked(job)}", f"ExcNodeList={','.join(dict.fromkeys(nodes))}"])


def requeue(job: str) -> None:
    """Have a job start again, from its batch script on.

    Raises:
        UnreachableError: SLURM does not answer.
        LaunchError: SLURM refuses.
    """
    run(["scontrol", "requeue", checked(job)])


def lift_wait(job: str, found: JobState | None = None) -> bool:
    """Let a requeued job start now: SLURM makes it wait 120 s, whatever it is configured to do (22.05).

    Not at once: nodes refuse a start whose credential is no younger than the end of the one before (to a second), and
    the job is FAILED then; seen once in 20 requeues, when this was called in the same second.

    Args:
        job: its id.
        found: what SLURM said of it a moment ago; None: it is asked.

    Returns:
        Whether there was a wait, and it was permitted to lift it.
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
    """A job's id.

    Raises:
        LaunchError: it is none.
    """
    if not re.fullmatch(r"\d+(_\d+)?", job):
        raise LaunchError(f"{job!r} is no job id of SLURM")
    return job


def run(command: Sequence[str], *, timeout_s: float = _TIMEOUT_S) -> str:
    """What a command of SLURM prints.

    Raises:
        UnreachableError: slurmctld does not answer.
        LaunchError: it refuses, or the command is not on this machine.
    """
    # Variables of a user's shell that change what is asked, whom, or how times are printed.
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
        if ended.returncode < 0 or no_answer(ended.stderr):  # SIGPIPE: slurmctld ended within its answer
            raise UnreachableError(f"SLURM does not answer: {' '.join(command[:3])}: {said}", remedy=_AWAY)
        raise LaunchError(f"{' '.join(command[:3])}: {said}")
    return ended.stdout
