"""Checks and submits launches.

`mmscale launch`: checks a run before it is queued, writes its launch folder, and submits it to SLURM through submitit,
or runs it on this machine. job.py is the process inside the job.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from launch import batch_script, container, job, job_environment, owner, scheduler, successors
from launch import rank_command as ranks
from launch import record as records
from launch.profile import Profile, load_profile
from mmscale.config import Config
from mmscale.config.load import load
from mmscale.errors import LaunchError, UsageError
from mmscale.train.already_done import already_done
from mmscale.train.stages.table import MAIN, STAGES

__all__ = ["Planned", "launch", "plan_launch", "script"]

_BETWEEN_VALUES = re.compile(r",(?![^\[]*\])")  # commas within a list are part of its value
_SWEEP = re.compile(r"^[A-Za-z0-9_.]+=[^=]+$")


@dataclass(frozen=True)
class Planned:
    """A run that passed all checks and is not submitted yet.

    Attributes:
        record: of its launch.
        config: resolved.
        done: why a launch would do nothing, in one line; "": something is left to train.
    """

    record: records.Record
    config: Config
    done: str = ""


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
    asked: Mapping[str, str] = MappingProxyType({}),
    from_scratch: bool = False,
) -> list[Planned]:
    """Check one run, or one for each combination of a sweep.

    Args:
        config_file: the configuration.
        overrides: settings that replace the file's.
        cluster: name of a profile, or its file.
        nodes: instead of the profile's.
        sweep: `key=value,value,...` each.
        stage: of the run.
        after: the run starts when another job has ended.
        yes: continue although the objective or the data have changed since the newest checkpoint.
        asked: settings of the profile that the command line replaces (`profile.ASKED`).
        from_scratch: start at step 0 although the checkpoints are lost.

    Raises:
        MmscaleError: anything that would make the run fail at its start.
    """
    profile = load_profile(cluster, asked)
    planned = []
    for variant, suffix in _variants(sweep):
        config = load(config_file, [*overrides, *variant])
        if suffix:
            config = load(config_file, [*overrides, *variant, f"run.name={config.run.name}-{suffix}"])
        count, tasks = _layout(config, profile, nodes)
        STAGES[stage].preflight(
            config,
            world_size=count * tasks,
            yes=yes,
            waits=after,
            from_scratch=from_scratch,
            plugins_here=profile.container is None,
        )
        record = records.plan_record(
            config,
            cluster=cluster,
            profile=profile,
            nodes=count,
            tasks_per_node=tasks,
            stage=stage,
            yes=yes,
            asked=asked,
            from_scratch=from_scratch,
        )
        container.check(record, profile, config)
        planned.append(Planned(record, config, "" if after else already_done(STAGES[stage], config)))
    return planned


def _layout(config: Config, profile: Profile, nodes: int | None) -> tuple[int, int]:
    """Number of nodes, and of ranks on each."""
    if profile.scheduler == "slurm" or profile.tasks_per_node is not None or profile.gpus_per_node:
        return nodes or profile.nodes, profile.tasks
    if nodes not in (None, 1):
        raise UsageError(f"--nodes {nodes}: this is one machine", remedy="leave --nodes out, or name a SLURM profile")
    parallel = config.parallel
    return 1, parallel.tp * parallel.pp * parallel.ep


def _variants(sweep: Sequence[str]) -> Iterator[tuple[list[str], str]]:
    """Overrides of each combination, and the suffix of its name."""
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


def launch(planned: Sequence[Planned], *, after: str | None = None, at_once: int | None = None) -> list[dict[str, Any]]:
    """Write launch folders and submit their jobs, or run them here if the profile is local.

    Runs with nothing left to train are not started.

    Args:
        planned: from `plan_launch`; several become a job array.
        after: a job or a run whose jobs have to end first.
        at_once: how many runs of a sweep may train at a time; None: all.

    Returns:
        One object per run, in their order: run, job, launch, successors (jobs that wait behind it), exit_status of
            those run here, and `done` of `Planned` if it is not "".

    Raises:
        MmscaleError: a run is being trained already, or SLURM refuses.
    """
    left = [one for one in planned if not one.done]
    started = iter(_start(left, after=after, at_once=at_once) if left else ())
    return [_row(one.record) | {"launch": "", "done": one.done} if one.done else next(started) for one in planned]


def _start(planned: Sequence[Planned], *, after: str | None, at_once: int | None) -> list[dict[str, Any]]:
    profile = planned[0].record.checked_profile()
    if profile.scheduler == "slurm" and shutil.which("sbatch") is None:
        raise LaunchError("there is no sbatch on this machine", remedy="use a login node, or --cluster local")
    dependency = _after(after)
    if dependency is None:
        _refuse_busy(planned)
    job_environment.check_secrets(profile)
    with job_environment.shared(profile):
        for one in planned:
            records.write_record(one.record, one.config)
            job_environment.write_secrets(profile, Path(one.record.folder))
        if profile.scheduler != "slurm":
            return [_run_here(one.record) for one in planned]
        found = _submit(planned, profile, dependency=dependency, at_once=at_once)
    return [_row(one.record, jobs) for one, jobs in zip(planned, found, strict=True)]


def _row(record: records.Record, jobs: Sequence[str] = ()) -> dict[str, Any]:
    return {"run": record.run, "job": jobs[0] if jobs else "", "launch": record.folder, "successors": [*jobs[1:]]}


def _submit(
    planned: Sequence[Planned], profile: Profile, *, dependency: str | None, at_once: int | None
) -> list[list[str]]:
    """Submit the job of each run and its successors; returns their numbers, run by run."""
    unknown = scheduler.unknown_nodes(profile.cordoned())
    exclude = [node for node in profile.excluded() if node not in unknown]
    numbers: list[str] = []
    try:
        chosen = batch_script.executor(
            [one.record for one in planned], profile, dependency=dependency, exclude=exclude, at_once=at_once
        )
        submitted = batch_script.submit(chosen, [job.Job(one.record.folder) for one in planned], profile)
        numbers = [one.id for one in submitted]
        for keys in (
            [records.JobKey(number) for number in numbers],
            batch_script.keys(numbers),
        ):  # stored at once, so that the number is not lost
            for one, key, taken in zip(planned, keys, submitted, strict=True):
                records.set_job(Path(one.record.folder), key, log=taken.log)
        for one in planned:
            for _ in range(profile.chain - 1):
                task = job.Job(one.record.folder)
                numbers.append(successors.submit(one.record, profile, task, exclude=exclude))
    except LaunchError:
        for number in reversed(numbers):
            with contextlib.suppress(LaunchError):
                scheduler.cancel(number)
        for one in planned:
            records.remove(one.record)  # no job was submitted
        raise
    return [[key.id for key in records.keys_of(Path(one.record.folder))] for one in planned]


def _refuse_busy(planned: Sequence[Planned]) -> None:
    """Refuse runs that are being trained, or another stage of which is, because stages use each other's checkpoints."""
    for one in planned:
        for folder in one.record.stage_folders:
            owner.refuse_busy(folder)


def script(planned: Sequence[Planned], *, after: str | None = None, at_once: int | None = None) -> str:
    """The batch script that `launch` would submit. It needs neither a cluster nor the launch folder.

    If nothing is left to train of any run, it is that of a first start.
    """
    planned = [one for one in planned if not one.done] or planned
    profile = planned[0].record.checked_profile()
    if profile.scheduler != "slurm":
        logs = Path(planned[0].record.run) / "logs"
        return shlex.join(ranks.command(planned[0].record, profile, logs=logs, environ=os.environ))
    executor = batch_script.executor(
        [one.record for one in planned],
        profile,
        dependency=_after(after),
        exclude=profile.excluded(),
        at_once=at_once,
    )
    if len(planned) > 1:
        executor.parameters["map_count"] = len(planned)
    return str(executor._make_submission_file_text(executor._submitit_command_str, "dry-run"))


def _run_here(record: records.Record) -> dict[str, Any]:
    """Run the job in this process, with the code of the snapshot."""
    with job_environment.only(record.checked_profile()):
        os.environ.update(records.python_variables(record))
        status = job.main(Path(record.folder))
    return _row(record) | {"exit_status": status}


def _after(after: str | None) -> str | None:
    """SLURM's dependency: the run starts when that job has ended, in whatever way."""
    if after is None:
        return None
    if re.fullmatch(r"\d+(_\d+)?", after):
        return f"afterany:{after}"
    newest = records.latest(Path(after))
    names = [key.id for key in records.keys_of(newest)] if newest is not None else []
    if not names:
        raise UsageError(f"--after {after}: neither a job nor a run with one", remedy="name a job id or a run's folder")
    return f"afterany:{':'.join(names)}"
