# `mmscale launch`: checks a run before anybody queues for it, writes its launch folder, hands it to SLURM by submitit,
# or runs it here. What happens inside the job is job.py's.
"""Submission."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.slurm.slurm import SlurmExecutor

from launch import job, job_table, owner, passed, ranks, scheduler
from launch import record as records
from launch.profile import Profile, load_profile
from mmscale.config import Config
from mmscale.config.load import load
from mmscale.errors import LaunchError, UsageError
from mmscale.train.stages.table import MAIN, STAGES

__all__ = ["Planned", "launch", "plan_launch", "script"]

_SETUP_FAILED = 2  # as for a configuration: starting again would not help
_NEVER_TIMES_OUT = 1_000_000  # restarts are counted by job.py; submitit's own count would end them
_BETWEEN_VALUES = re.compile(r",(?![^\[]*\])")  # commas within a list belong to its value
_SWEEP = re.compile(r"^[A-Za-z0-9_.]+=[^=]+$")


@dataclass(frozen=True)
class Planned:
    """A run that passed all checks, and is not submitted.

    Attributes:
        record: of its launch.
        config: resolved.
    """

    record: records.Record
    config: Config


class _Executor(SlurmExecutor):
    """submitit's, which also writes scripts where there is no SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def plan_launch(
    config_file: Path,
    overrides: Sequence[str] = (),
    *,
    cluster: str,
    nodes: int | None = None,
    sweep: Sequence[str] = (),
    stage: str = MAIN,
    after: bool = False,
    yes: bool = False,
) -> list[Planned]:
    """Check one run, or one for each combination of a sweep.

    Args:
        config_file: the configuration.
        overrides: settings that replace the file's.
        cluster: name of a profile, or its file.
        nodes: instead of the profile's.
        sweep: `key=value,value,...` each.
        stage: which stage of the run.
        after: it will start when another job has ended.
        yes: go on although the objective or the data have changed since the newest checkpoint.

    Raises:
        MmscaleError: anything that would make a run fail at its start.
    """
    profile = load_profile(cluster)
    planned = []
    for variant, suffix in _variants(sweep):
        config = load(config_file, [*overrides, *variant])
        if suffix:
            config = load(config_file, [*overrides, *variant, f"run.name={config.run.name}-{suffix}"])
        count, tasks = _layout(config, profile, nodes)
        STAGES[stage].preflight(config, world_size=count * tasks, yes=yes, waits=after)
        record = records.plan_record(
            config, cluster=cluster, profile=profile, nodes=count, tasks_per_node=tasks, stage=stage, yes=yes
        )
        planned.append(Planned(record, config))
    return planned


def _layout(config: Config, profile: Profile, nodes: int | None) -> tuple[int, int]:
    """Nodes, and ranks on each."""
    if profile.scheduler == "slurm" or profile.tasks_per_node is not None or profile.gpus_per_node:
        return nodes or profile.nodes, profile.tasks
    if nodes not in (None, 1):
        raise UsageError(f"--nodes {nodes}: this is one machine", remedy="leave --nodes out, or name a SLURM profile")
    parallel = config.parallel
    return 1, parallel.tp * parallel.pp * parallel.ep


def _variants(sweep: Sequence[str]) -> Iterator[tuple[list[str], str]]:
    """Overrides of each combination, and what its name ends with."""
    axes = []
    for text in sweep:
        if not _SWEEP.match(text):
            raise UsageError(f"--sweep {text!r} is not key=value,value,...", remedy="e.g. --sweep train.lr=1e-4,3e-4")
        key, _, values = text.partition("=")
        chosen = [value.strip() for value in _BETWEEN_VALUES.split(values) if value.strip()]
        if twice := next((value for value in chosen if chosen.count(value) > 1), None):
            raise UsageError(
                f"--sweep {text!r} has {twice} twice", remedy="two runs would have one name: leave one out"
            )
        axes.append([(key, value) for value in chosen])
    for choice in itertools.product(*axes):
        names = [f"{key.rpartition('.')[2]}-{re.sub(r'[^A-Za-z0-9._-]', '_', value)}" for key, value in choice]
        yield [f"{key}={value}" for key, value in choice], "-".join(names)


def launch(planned: Sequence[Planned], *, after: str | None = None) -> list[dict[str, Any]]:
    """Write launch folders and submit their jobs, or run them here if the profile says so.

    Args:
        planned: what `plan_launch` gave; more than one becomes a job array.
        after: a job or a run whose job has to end first.

    Returns:
        One object per run: run, job, launch, and exit_status for those run here.

    Raises:
        MmscaleError: a run is being trained already, or SLURM refuses.
    """
    profile = planned[0].record.checked_profile()
    if profile.scheduler == "slurm" and shutil.which("sbatch") is None:
        raise LaunchError("there is no sbatch on this machine", remedy="use a login node, or --cluster local")
    dependency = _after(after)
    if dependency is None:
        _refuse_busy(planned)
    passed.check_secrets(profile)
    for one in planned:
        records.write_record(one.record, one.config)
        passed.write_secrets(profile, Path(one.record.folder))
    if profile.scheduler != "slurm":
        return [_here(one.record) for one in planned]
    executor = _executor(
        [one.record for one in planned],
        profile,
        dependency=dependency,
        unknown=scheduler.unknown_nodes(profile.cordoned()),
    )
    jobs = [job.Job(one.record.folder) for one in planned]
    with passed.only(profile):
        try:
            if len(jobs) == 1:
                submitted = [executor.submit(jobs[0])]
            else:
                with executor.batch():
                    submitted = [executor.submit(one) for one in jobs]
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError, OSError) as error:
            lines = [line for line in str(error).splitlines() if "error" in line.lower()]
            for one in planned:
                records.remove(one.record)  # nothing was launched
            said = lines[-1] if lines else str(error).strip().splitlines()[-1]
            if scheduler.no_answer(str(error)):
                raise scheduler.UnreachableError(
                    f"SLURM does not answer: {said}", remedy="launch again when it does (`scontrol ping`)"
                ) from None
            raise LaunchError(
                f"SLURM did not take the job: {said}", remedy=f"look at the profile {planned[0].record.cluster}"
            ) from None
    numbers = [str(taken.job_id) for taken in submitted]
    logs = {str(taken.job_id): str(taken.paths.stdout) for taken in submitted}
    for keys in ([records.JobKey(number) for number in numbers], _keys(numbers)):  # the number at once
        for one, key in zip(planned, keys, strict=True):
            records.set_job(Path(one.record.folder), key, log=logs[key.id])
    return [
        {"run": one.record.run, "job": number, "launch": one.record.folder}
        for one, number in zip(planned, numbers, strict=True)
    ]


def _refuse_busy(planned: Sequence[Planned]) -> None:
    """Nobody may train the same; nor another stage of the run, since they go on from each other's checkpoints."""
    for one in planned:
        for folder in one.record.stage_folders:
            owner.refuse_busy(folder)


def _keys(numbers: Sequence[str]) -> list[records.JobKey]:
    """What tells these jobs from others that get their numbers; as much of it as SLURM says now."""
    try:
        cluster, states = scheduler.cluster_name(), job_table.states_of(numbers)
    except LaunchError:
        return [records.JobKey(number) for number in numbers]
    found = []
    for number in numbers:
        state = states.get(number, scheduler.JobState(number, ""))
        found.append(records.JobKey(number, cluster, state.name, state.submitted))
    return found


def script(planned: Sequence[Planned], *, after: str | None = None) -> str:
    """The batch script that `launch` would submit. Neither a cluster nor the launch folder is needed."""
    profile = planned[0].record.checked_profile()
    if profile.scheduler != "slurm":
        logs = Path(planned[0].record.run) / "logs"
        return shlex.join(ranks.command(planned[0].record, profile, logs=logs, environ=os.environ))
    executor = _executor([one.record for one in planned], profile, dependency=_after(after, ask=False))
    if len(planned) > 1:
        executor.parameters["map_count"] = len(planned)
    return str(executor._make_submission_file_text(executor._submitit_command_str, "dry-run"))


def _here(record: records.Record) -> dict[str, Any]:
    """Run the job in this process, with the code of the snapshot."""
    with passed.only(record.checked_profile()):
        os.environ.update(records.python_variables(record))
        status = job.main(Path(record.folder))
    return {"run": record.run, "job": "", "launch": record.folder, "exit_status": status}


def _after(after: str | None, *, ask: bool = True) -> str | None:
    """SLURM's dependency: the run goes on when that job has ended, however it did."""
    if after is None:
        return None
    if re.fullmatch(r"\d+(_\d+)?", after):
        return f"afterany:{after}"
    newest = records.latest(Path(after))
    name = records.job_of(newest) if newest is not None else None
    if name is None:
        raise UsageError(f"--after {after}: neither a job nor a run with one", remedy="name a job id or a run's folder")
    return f"afterany:{name}"


def _executor(
    taken: Sequence[records.Record], profile: Profile, *, dependency: str | None, unknown: Sequence[str] = ()
) -> SlurmExecutor:
    first = taken[0]
    # exec: the batch process becomes Python, so that what SLURM sends to the batch script reaches it.
    executor = _Executor(
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
        "time": profile.time,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "exclude": ",".join(node for node in profile.excluded() if node not in unknown) or None,
        "exclusive": profile.exclusive or None,
        "dependency": dependency,
        "use_srun": False,
        "stderr_to_stdout": True,
        "wckey": None,
        "setup": _setup(first, profile),
    }
    more: dict[str, Any] = {
        "chdir": first.cwd,
        "requeue": True,
        # To the batch script alone: it knows when ranks can be told.
        "signal": f"B:USR2@{round(profile.signal_delay)}",
        "reservation": profile.reservation,
        "mem": None if profile.memory_gb is None else f"{profile.memory_gb}G" if profile.memory_gb else "0",
        **profile.sbatch,
    }
    parameters["additional_parameters"] = {key: value for key, value in more.items() if value not in (None, False)}
    executor.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
    executor.parameters["wckey"] = None  # submitit's own mark, which sites without accounting refuse
    return executor


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
