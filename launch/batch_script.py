# The batch script of a launch: what is asked of sbatch and the shell lines before the job's own process, and how it is
# submitted through submitit. Which jobs are submitted, submit.py and successors.py decide.
"""Batch scripts."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.slurm.slurm import SlurmExecutor

from launch import job_table, passed, scheduler
from launch import record as records
from launch.profile import Profile
from launch.record import JobKey
from mmscale.errors import LaunchError

_SETUP_FAILED = 2  # as for a configuration: starting again would not help
_NEVER_TIMES_OUT = 1_000_000  # restarts are counted by job.py; submitit's own count would end them


@dataclass(frozen=True)
class Submitted:
    """A job that SLURM took.

    Attributes:
        id: its number.
        log: file that it prints into.
    """

    id: str
    log: str


class _Executor(SlurmExecutor):
    """submitit's, which also writes scripts where there is no SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def executor(
    taken: Sequence[records.Record],
    profile: Profile,
    *,
    dependency: str | None,
    exclude: Sequence[str] = (),
    at_once: int | None = None,
) -> SlurmExecutor:
    """Submitit's executor for the jobs of some launches.

    Args:
        taken: the launches; more than one becomes a job array.
        profile: of the cluster.
        dependency: SLURM's, e.g. afterany:12.
        exclude: nodes that are not to be used.
        at_once: how many tasks of the array may run at a time; None: all of them.
    """
    first = taken[0]
    # exec: the batch process becomes Python, so that what SLURM sends to the batch script reaches it.
    chosen = _Executor(
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
        # To the batch script alone: it knows when ranks can be told.
        "signal": f"B:USR2@{round(profile.signal_delay)}",
        "reservation": profile.reservation,
        "mem": None if profile.memory_gb is None else f"{profile.memory_gb}G" if profile.memory_gb else "0",
        **profile.sbatch,
    }
    parameters["additional_parameters"] = {key: value for key, value in more.items() if value not in (None, False)}
    chosen.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
    # Instead of submitit's defaults: a mark that sites without accounting refuse, and 5 minutes.
    for name in ("wckey", "time"):
        chosen.parameters[name] = parameters[name]
    return chosen


def submit(chosen: SlurmExecutor, jobs: Sequence[Callable[[], None]], profile: Profile) -> list[Submitted]:
    """Submit jobs, several of them as an array.

    Raises:
        UnreachableError: SLURM does not answer.
        LaunchError: it refuses.
    """
    with passed.only(profile):
        try:
            if len(jobs) == 1:
                found = [chosen.submit(jobs[0])]
            else:
                with chosen.batch():
                    found = [chosen.submit(one) for one in jobs]
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError, OSError) as error:
            lines = [line for line in str(error).splitlines() if "error" in line.lower()]
            said = lines[-1] if lines else str(error).strip().splitlines()[-1]
            if scheduler.no_answer(str(error)):
                raise scheduler.UnreachableError(
                    f"SLURM does not answer: {said}", remedy="launch again when it does (`scontrol ping`)"
                ) from None
            raise LaunchError(f"SLURM did not take the job: {said}", remedy="look at the profile") from None
    return [Submitted(str(one.job_id), str(one.paths.stdout)) for one in found]


def remove_stale_results(job: str) -> None:
    """Remove what submitit left of an earlier start of this job: it would be taken for this one's.

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
    """What tells these jobs from others that get their numbers; as much of it as SLURM says now."""
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
    """Shell lines before the command; every value in them is quoted."""
    lines = [
        "# Until Python listens, a request to save must not end the script.",
        "trap '' USR1 USR2",
        *passed.comments(profile),
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
