"""States of runs that do not train, each with its meaning.

What `mmscale status` calls a run whose jobs do not run. job_states.py has SLURM's states, which it shows otherwise.
"""

from __future__ import annotations

from enum import StrEnum


class RunState(StrEnum):
    """The state of a run without a live job. The causes in `job_states.STATES` and of crashes are states as well."""

    FINISHED = "finished"
    ENDED_EARLY = "ended early"
    STOPPED = "stopped"
    GAVE_UP = "gave up"
    UNFIT_NODES = "unfit nodes"
    FAILED = "failed"
    CRASHED = "crashed"
    KILLED = "killed"
    UNEXPLAINED = "ended unexplained"
    ENDED = "ended"
    UNKNOWN = "unknown"
    UNREADABLE = "unreadable"


MEANINGS: dict[RunState, str] = {
    RunState.FINISHED: "the run recorded its last step",
    RunState.ENDED_EARLY: "`train.stop_when` ended the run before its last step",
    RunState.STOPPED: "the run saved and stopped, on request or because its job had to end",
    RunState.GAVE_UP: "the budget of restarts is spent, or SLURM did not answer for `slurm_patience`",
    RunState.UNFIT_NODES: "node checks failed before ranks started",
    RunState.FAILED: "exit status 2, 3, 4 or 74: configuration, data, checkpoint or storage",
    RunState.CRASHED: "a rank failed, and the run was not restarted",
    RunState.KILLED: "the process that trained the run on this machine or another one is gone without a record",
    RunState.UNEXPLAINED: "the job is COMPLETED, and the run did not record why it ended before its last step",
    RunState.ENDED: "neither the run nor SLURM has a record of how it ended",
    RunState.UNKNOWN: "SLURM does not answer, the job belongs to another cluster, or the run was never started",
    RunState.UNREADABLE: "files of the run cannot be read",
}
