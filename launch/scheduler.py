# What SLURM knows of a job and can be asked to do with it, through scontrol and scancel; sacct is not needed.
# It decides nothing: job.py and control.py do.
"""SLURM's commands."""

from __future__ import annotations

import datetime
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from mmscale.errors import LaunchError

# States out of which a job does not come back by itself.
ENDED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}
)
_TIMEOUT_S = 60.0
_WAIT_S, _SETTLED_S = 120.0, 4.0  # SLURM's wait after a requeue, and the part of it that must not be lifted


@dataclass(frozen=True)
class JobState:
    """One job as scontrol shows it.

    Attributes:
        id: as SLURM numbers it, array tasks too.
        state: RUNNING, PENDING, ...
        reason: why it waits; "" if nobody says.
        restarts: how often it was requeued.
        nodes: SLURM's host list.
        exit_status: of its batch script.
        start: when it started or will start, as SLURM prints it.
        preempted: whether it has been asked to make room since it started.
    """

    id: str
    state: str
    reason: str = ""
    restarts: int = 0
    nodes: str = ""
    exit_status: int = 0
    start: str = ""
    preempted: bool = False

    @property
    def ended(self) -> bool:
        """Whether it does not come back by itself."""
        return self.state in ENDED


def job_state(job: str) -> JobState | None:
    """What SLURM says of a job; None if it does not know it (any more).

    Raises:
        LaunchError: SLURM does not answer.
    """
    try:
        text = _run(["scontrol", "--oneliner", "show", "job", _checked(job)])
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
        state=fields["JobState"],
        reason="" if reason == "None" else reason,
        restarts=int(fields.get("Restarts", "0")),
        nodes="" if fields.get("NodeList") in (None, "(null)") else fields["NodeList"],
        exit_status=int(fields.get("ExitCode", "0:0").partition(":")[0]),
        start=fields.get("StartTime", ""),
        preempted=preempted[:1].isdigit() and preempted >= fields.get("StartTime", ""),
    )


def lost_nodes(hosts: str) -> dict[str, str]:
    """Those of some nodes that have failed, with their state; not those that a person keeps jobs away from (DRAIN).

    Args:
        hosts: as SLURM lists them, e.g. n[1-64].
    """
    if not hosts:
        return {}
    try:
        text = _run(["scontrol", "--oneliner", "show", "node", hosts])
    except LaunchError:
        return {}
    states = re.findall(r"^NodeName=(\S+) .*?\bState=(\S+)", text, flags=re.MULTILINE)
    # POWERED_DOWN is not DOWN; * marks a node that does not answer.
    return {node: state for node, state in states if re.search(r"(?<![A-Z_])(DOWN|FAIL|NOT_RESPONDING)|\*", state)}


def requeue(job: str) -> None:
    """Have a job start again, from its batch script on.

    Raises:
        LaunchError: SLURM refuses.
    """
    _run(["scontrol", "requeue", _checked(job)])


def lift_wait(job: str) -> bool:
    """Let a requeued job start now: SLURM makes it wait 120 s, whatever it is configured to do (22.05).

    Not at once: nodes refuse a start whose credential is no younger than the end of the one before (to a second), and
    the job is FAILED then; seen once in 20 requeues, when this was called in the same second.

    Returns:
        Whether there was a wait, and it was permitted to lift it.
    """
    found = job_state(job)
    if found is None or found.state != "PENDING" or found.reason != "BeginTime" or found.restarts == 0:
        return False
    try:
        left = datetime.datetime.fromisoformat(found.start) - datetime.datetime.now()
    except ValueError:
        return False
    if left.total_seconds() > _WAIT_S - _SETTLED_S:
        return False
    try:
        _run(["scontrol", "update", f"JobId={_checked(job)}", "StartTime=now"])
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
    _run([*command, _checked(job)])


def _checked(job: str) -> str:
    if not re.fullmatch(r"\d+(_\d+)?", job):
        raise LaunchError(f"{job!r} is no job id of SLURM")
    return job


def _run(command: Sequence[str]) -> str:
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except FileNotFoundError:
        raise LaunchError(
            f"there is no {command[0]} on this machine", remedy="use a login node of the cluster, or --cluster local"
        ) from None
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{command[0]} did not answer within {_TIMEOUT_S:g} s") from None
    if ended.returncode:
        said = (ended.stderr or ended.stdout).strip().splitlines()
        raise LaunchError(f"{' '.join(command[:3])}: {said[-1] if said else f'exit status {ended.returncode}'}")
    return ended.stdout
