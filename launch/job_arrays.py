"""Job arrays of functions.

Submits work other than training runs, as a job array and one job after it. The caller passes functions, which must be
module-level, because submitit pickles them.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import SlurmExecutor

from launch import batch_script, job_environment, scheduler
from launch.job_table import states_of
from launch.profile import Profile
from mmscale.errors import LaunchError


def check(profile: Profile, *, gpus: int = 0) -> None:
    """Refuse job arrays if none can be submitted.

    Args:
        profile: of the cluster.
        gpus: of each task.

    Raises:
        LaunchError: there is no SLURM, the profile is local, or its nodes have fewer GPUs.
    """
    if profile.scheduler != "slurm" or shutil.which("sbatch") is None:
        raise LaunchError(
            "a job array needs SLURM: there is no sbatch on this machine, or the profile is local",
            remedy="use a login node, or leave --cluster out",
        )
    if gpus > profile.gpus_per_node:
        raise LaunchError(
            f"each task asks for {gpus} GPUs, and the profile's nodes have {profile.gpus_per_node} (gpus_per_node)",
            remedy="correct the profile, or ask for fewer --gpus",
        )


def unfinished(jobs: Iterable[str]) -> list[str]:
    """Numbers of those jobs that wait, run, or may start again; an array has one number.

    Raises:
        UnreachableError: SLURM does not answer.
    """
    found = (job.partition("_")[0] for job, state in sorted(states_of(jobs).items()) if not state.ended)
    return list(dict.fromkeys(found))


def submit(
    stages: Sequence[Sequence[Callable[[], Any]]],
    *,
    folder: Path,
    name: str,
    profile: Profile,
    gpus: Sequence[int] = (),
) -> list[str]:
    """Submit functions: those of a stage as tasks of an array, which starts when the stage before has ended.

    A stage starts in whatever way the tasks before it ended. SLURM requeues a task whose node fails. The last function
    must do the work that killed tasks left undone.

    Args:
        stages: functions of each array.
        folder: for submitit's files and the jobs' logs, on a file system that the nodes share.
        name: of the jobs.
        profile: of the cluster.
        gpus: of each task, by stage; empty: none.

    Returns:
        Numbers of the tasks' jobs, in their order.

    Raises:
        LaunchError: there is no SLURM, or it refuses; jobs that it took before are cancelled.
    """
    check(profile, gpus=max(gpus, default=0))
    found: list[str] = []
    behind: str | None = None
    with job_environment.shared(profile):
        for stage, each in zip(stages, gpus or [0] * len(stages), strict=True):
            try:
                array = batch_script.submit(_executor(folder, name, profile, behind, each), stage, profile)
            except LaunchError:
                for number in found:
                    scheduler.cancel(number)
                raise
            numbers = [one.id for one in array]
            behind = f"afterany:{':'.join(dict.fromkeys(number.partition('_')[0] for number in numbers))}"
            found += numbers
    return found


def _executor(folder: Path, name: str, profile: Profile, dependency: str | None, gpus: int) -> SlurmExecutor:
    chosen = batch_script.Executor(folder=folder, python=f"exec {shlex.quote(sys.executable)}")
    setup = [*profile.setup]
    for variable, given in profile.environment.items():
        setup += [f"# {given.reason}", f"export {variable}={shlex.quote(given.value)}"]
    parameters: dict[str, Any] = {
        "job_name": name,
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": profile.cpus_per_task,
        "gpus_per_node": gpus or None,
        "time": profile.time or scheduler.partition_limit(profile.partition),
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "dependency": dependency,
        "use_srun": False,
        "stderr_to_stdout": True,
        "wckey": None,
        "setup": setup,
    }
    more: dict[str, Any] = {
        "requeue": True,
        "reservation": profile.reservation,
        "mem": None if profile.memory_gb is None else f"{profile.memory_gb}G" if profile.memory_gb else "0",
        **profile.sbatch,
    }
    parameters["additional_parameters"] = {key: value for key, value in more.items() if value not in (None, False)}
    chosen.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
    for key in ("wckey", "time"):  # submitit's defaults: an option that sites without accounting refuse, and 5 minutes
        chosen.parameters[key] = parameters[key]
    return chosen
