"""SLURM's job states.

A table of all job states of SLURM and their meanings for a run. scheduler.py queries SLURM, policy.py decides.

Names: section JOB STATE CODES of squeue(1) and sacct(1) of SLURM 22.05, and base states and flags of
https://slurm.schedmd.com/job_state_codes.html (24.05 and newer).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """The phase of a job between submission and end."""

    WAITING = "waiting"  # in the queue, held, or its nodes are being prepared: no process of it runs
    RUNNING = "running"
    PAUSED = "paused"  # its processes are stopped, and will be continued
    ENDING = "ending"  # SLURM is ending its processes; the job may be requeued afterwards
    ENDED = "ended"  # it will not start again by itself


@dataclass(frozen=True)
class Meaning:
    """The meaning of a state.

    Attributes:
        phase: of the job.
        failure: how `mmscale status` calls a run that ended in this state without recording its end; "" if the state
            does not show why a job ended.
    """

    phase: Phase
    failure: str = ""


STATES: dict[str, Meaning] = {
    "PENDING": Meaning(Phase.WAITING),
    "CONFIGURING": Meaning(Phase.WAITING),
    "POWER_UP_NODE": Meaning(Phase.WAITING),
    "EXPEDITING": Meaning(Phase.WAITING),
    "REQUEUED": Meaning(Phase.WAITING),
    "REQUEUE_FED": Meaning(Phase.WAITING),
    "REQUEUE_HOLD": Meaning(Phase.WAITING),
    "RESV_DEL_HOLD": Meaning(Phase.WAITING),
    "SPECIAL_EXIT": Meaning(Phase.WAITING),
    "RUNNING": Meaning(Phase.RUNNING),
    "RESIZING": Meaning(Phase.RUNNING),
    "SIGNALING": Meaning(Phase.RUNNING),
    "UPDATE_DB": Meaning(Phase.RUNNING),
    "STOPPED": Meaning(Phase.PAUSED),
    "SUSPENDED": Meaning(Phase.PAUSED),
    "COMPLETING": Meaning(Phase.ENDING),
    "STAGE_OUT": Meaning(Phase.ENDING),
    "BOOT_FAIL": Meaning(Phase.ENDED, "its nodes did not start"),
    "CANCELLED": Meaning(Phase.ENDED, "cancelled"),
    "COMPLETED": Meaning(Phase.ENDED),
    "DEADLINE": Meaning(Phase.ENDED, "its deadline passed"),
    "FAILED": Meaning(Phase.ENDED),
    "LAUNCH_FAILED": Meaning(Phase.ENDED, "its nodes did not start"),
    "NODE_FAIL": Meaning(Phase.ENDED, "a node failed"),
    "OUT_OF_MEMORY": Meaning(Phase.ENDED, "out of memory"),
    "PREEMPTED": Meaning(Phase.ENDED, "preempted"),
    "RECONFIG_FAIL": Meaning(Phase.ENDED, "its nodes did not start"),
    "REVOKED": Meaning(Phase.ENDED, "taken over by another cluster"),
    "TIMEOUT": Meaning(Phase.ENDED, "its time limit passed"),
}


def name_of(text: str) -> str:
    """The state in the output of a SLURM command: sacct prints `CANCELLED by 1000`, and abbreviates names with a +."""
    word = (text.split() or [""])[0].rstrip("+")
    if word in STATES:
        return word
    return next((name for name in STATES if word and len(word) > 3 and name.startswith(word)), word)


def phase_of(state: str) -> Phase:
    """The phase of a job. A state that is not in the table is one of a newer SLURM, and the job counts as alive."""
    meaning = STATES.get(name_of(state))
    return meaning.phase if meaning is not None else Phase.RUNNING
