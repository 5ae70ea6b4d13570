"""Batch scripts and their submission.

The batch script of a launch: the options of sbatch, the shell lines before the job's process, and the submission
through submitit. submit.py and successors.py decide which jobs are submitted.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.slurm.slurm import SlurmExecutor

from launch import job_environment, job_table, scheduler
from launch import record as records
from launch.profile import Profile
from launch.record import JobKey
from mmscale.errors import LaunchError

_SETUP_FAILED = 2  # the status of a wrong configuration: a restart would not help
_NEVER_TIMES_OUT = 1_000_000  # job.py counts restarts; submitit's own count would end the job too early


@dataclass(frozen=True)
class Submitted:
    """A job that SLURM accepted.

    Attributes:
        id: its number.
        log: file that the job prints to.
    """

    id: str
    log: str


class Executor(SlurmExecutor):
    """submitit's executor, which can also write scripts on machines without SLURM."""

    @classmethod
    def affinity(cls) -> int:
        """As where there is SLURM."""
        return 2


def executor(
    taken: Sequence[records.Record],
    profile: Profile,
    *,
    dependency: str | None,
    exclude: Sequence[str] = (),
    at_once: int | None = None,
) -> SlurmExecutor:
    """The executor of submitit for the jobs of some launches.

    Args:
        taken: the launches; several become a job array.
        profile: of the cluster.
        dependency: of SLURM, e.g. afterany:12.
        exclude: nodes that must not be used.
        at_once: how many tasks of the array may run at a time; None: all.
    """
    first = taken[0]
    # exec: the batch process becomes Python, so that signals to the batch script reach it.
    chosen = Executor(
        folder=Path(first.folder) / "submitit",
        max_num_timeout=_NEVER_TIMES_OUT,
        python=f"exec {shlex.quote(first.python)}",
    )
    name = "-".join(dict.fromkeys((first.main_run.name, Path(first.run).name)))
    parameters: dict[str, Any] = {
        "job_name": f"mmscale-{name}",
        "nodes": first.nodes,
        "ntasks_per_node": first.tasks_per_node,
        "cpus_per_task": profile.cpus_per_task,
        "gpus_per_node": profile.gpus_per_node or None,
        "time": profile.time or scheduler.partition_limit(profile.partition),
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "exclude": ",".join(exclude) or None,
        "exclusive": profile.exclusive or None,
        "dependency": dependency,
        "use_srun": False,
        "stderr_to_stdout": True,
        "wckey": None,
        "setup": _setup(first, profile),
        "array_parallelism": at_once,
    }
    more: dict[str, Any] = {
        "chdir": first.cwd,
        "requeue" if profile.requeue else "no-requeue": True,
        # Signal the batch script only: the supervisor decides when to signal the ranks.
        "signal": f"B:USR2@{round(profile.signal_delay)}",
        "reservation": profile.reservation,
        "mem": None if profile.memory_gb is None else f"{profile.memory_gb}G" if profile.memory_gb else "0",
        **profile.sbatch,
    }
    parameters["additional_parameters"] = {key: value for key, value in more.items() if value not in (None, False)}
    chosen.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
    # Replaces submitit's defaults: an option that sites without accounting refuse, and 5 minutes.
    for name in ("wckey", "time"):
        chosen.parameters[name] = parameters[name]
    return chosen


def submit(chosen: SlurmExecutor, jobs: Sequence[Callable[[], None]], profile: Profile) -> list[Submitted]:
    """Submit jobs; several become an array.

    Raises:
        UnreachableError: SLURM does not answer.
        LaunchError: SLURM refuses.
    """
    with job_environment.only(profile):
        try:
            if len(jobs) == 1:
                found = [chosen.submit(jobs[0])]
            else:
                with chosen.batch():
                    found = [chosen.submit(one) for one in jobs]
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError, OSError) as error:
            said = _refusal(str(error))
            if scheduler.no_answer(str(error)):
                raise scheduler.UnreachableError(
                    f"SLURM does not answer: {said}", remedy="launch again when it does (`scontrol ping`)"
                ) from None
            raise LaunchError(f"SLURM did not take the job: {said}", remedy="look at the profile") from None
    return [Submitted(str(one.job_id), str(one.paths.stdout)) for one in found]


def _refusal(said: str) -> str:
    """The line of sbatch's output that says why it refuses."""
    lines = said.strip().splitlines()
    errors = [line for line in lines if "error" in line.lower()]
    named = [line for line in lines if line.startswith("sbatch: ")]  # an unknown option, before `Try "sbatch --help"`
    return (errors or named or lines or ["it gives no reason"])[-1]


def remove_stale_results(job: str) -> None:
    """Remove submitit's results of an earlier start of this job, which submitit would take for those of this start.

    Args:
        job: the job that this process runs in.
    """
    array = os.environ.get("SLURM_ARRAY_JOB_ID", "")
    name = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}" if array else job
    place = os.environ.get("SUBMITIT_FOLDER")
    if name and place:
        for file in Path(place.replace("%j", name)).glob(f"{name}_*_result.pkl*"):
            file.unlink(missing_ok=True)


def keys(numbers: Sequence[str]) -> list[JobKey]:
    """The identities of these jobs, as far as SLURM reports them now; numbers alone are reused."""
    try:
        cluster, states = scheduler.cluster_name(), job_table.states_of(numbers)
    except LaunchError:
        return [JobKey(number) for number in numbers]
    found = []
    for number in numbers:
        state = states.get(number, scheduler.JobState(number, ""))
        found.append(JobKey(number, cluster, state.name, state.submitted))
    return found


def _setup(record: records.Record, profile: Profile) -> list[str]:
    """Shell lines before the command, with all values quoted."""
    lines = [
        "# Until Python listens, a request to save must not end the script.",
        "trap '' USR1 USR2",
        *job_environment.comments(profile),
    ]
    if profile.setup:
        said = "error: setup of the profile failed with exit status $?: $BASH_COMMAND"
        lines += [f"trap 'echo \"{said}\" >&2; exit {_SETUP_FAILED}' ERR", *profile.setup, "trap - ERR"]
    for name, variable in profile.environment.items():
        lines += [f"# {variable.reason}", f"export {name}={shlex.quote(variable.value)}"]
    lines += ["# The code as it was when the job was submitted, and not what lies in the working directory."]
    variables = records.python_variables(record, {})
    lines += [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    lines[-len(variables)] += "${PYTHONPATH:+:$PYTHONPATH}"
    return lines
