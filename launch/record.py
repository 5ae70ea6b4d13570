"""Launch folders.

The launch folder RUN/launch/NNN/, written before anything runs: code, resolved configuration, environment and the
record of the launch. Edits made while a job waits change nothing. This module submits nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from launch import snapshot
from launch.profile import Profile, profile_of
from launch.scheduler import JobState, checked
from mmscale import bounded
from mmscale.config import Config
from mmscale.config.load import digest, dump
from mmscale.errors import LaunchError, UsageError, no_folder
from mmscale.runs.is_run import NAME_ANOTHER
from mmscale.runtime.atomic_files import write_atomic
from mmscale.runtime.environment import describe
from mmscale.train.stages.table import MAIN, STAGES

FOLDER, RECORD, JOB, STOP = "launch", "launch.json", "job.json", "stop.json"
LATER = "successors"  # in job.json


@dataclass(frozen=True)
class JobKey:
    """The identity of a job. Its number alone is not unique: numbers are reused, and other clusters have the same ones.

    Attributes:
        id: SLURM's number; array tasks are `12_3`.
        cluster: name of its cluster; "" if SLURM did not report it, as for the following.
        name: of the job.
        submitted: time of submission, as SLURM prints it.
    """

    id: str
    cluster: str = ""
    name: str = ""
    submitted: str = ""

    def is_job(self, state: JobState) -> bool:
        """Whether a state of SLURM belongs to this job. A requeue renews the time of submission."""
        if not self.submitted or not state.submitted or state.submitted == self.submitted:
            return True
        return state.submitted > self.submitted and state.name == self.name and state.requeued


@dataclass(frozen=True)
class Record:
    """One launch of one stage of a run: everything that its job needs, as plain JSON.

    Attributes:
        folder: RUN/launch/NNN.
        run: the folder of the run, or of its stage.
        cwd: working directory of the launch: base of relative paths in the configuration.
        cluster: name of the profile.
        profile: its content.
        nodes, tasks_per_node: numbers of nodes and of ranks on each.
        max_restarts, max_without_progress: of `resilience`.
        python: interpreter of the job.
        yes: the user has confirmed a change of the objective or the data.
        from_scratch: the job's first start ignores lost checkpoints; later starts resume from its own.
        time: of the launch [seconds since 1970].
        config_digest: of the resolved configuration.
        stage: of the run, by its name in mmscale.train.stages.table.
        asked: settings of the command line that replace the profile's.
    """

    folder: str
    run: str
    cwd: str
    cluster: str
    profile: dict[str, Any]
    nodes: int
    tasks_per_node: int
    max_restarts: int
    max_without_progress: int
    python: str = sys.executable
    yes: bool = False
    from_scratch: bool = False
    time: float = 0.0
    config_digest: str = ""
    stage: str = MAIN
    asked: Mapping[str, str] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.nodes * self.tasks_per_node

    @property
    def main_run(self) -> Path:
        """The run's folder, also for a stage of it."""
        return Path(self.run).parent if STAGES[self.stage].subfolder else Path(self.run)

    @property
    def stage_folders(self) -> list[Path]:
        """Folders of this stage and of all others of its run; only one of them trains at a time."""
        others = (stage.folder(self.main_run) for stage in STAGES.values())
        return list(dict.fromkeys((Path(self.run), *others)))

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return Path(self.folder) / "config.yaml"

    @property
    def code(self) -> Path:
        """The snapshot of the code, an archive that Python imports from."""
        return Path(self.folder) / "code.zip"

    def checked_profile(self) -> Profile:
        """The profile."""
        return profile_of(self.profile, where=f"{self.folder}/{RECORD}")


def plan_record(
    config: Config,
    *,
    cluster: str,
    profile: Profile,
    nodes: int,
    tasks_per_node: int,
    stage: str = MAIN,
    yes: bool = False,
    asked: Mapping[str, str] = MappingProxyType({}),
    from_scratch: bool = False,
) -> Record:
    """The record of a launch that is not written yet.

    Raises:
        UsageError: a path contains characters that SLURM or a shell would interpret.
    """
    run = STAGES[stage].folder(Path(config.run.dir) / config.run.name).absolute()
    for what, path in (("run.dir", run), ("the working directory", Path.cwd())):
        bad = sorted({character for character in str(path) if character in "%\\\"'`$\n\r\t"})
        if bad:
            raise UsageError(
                f"{what}: {str(path)!r} has {' '.join(map(repr, bad))}, which SLURM or a shell would read as a command",
                remedy="choose a path of letters, digits, spaces, '.', '_', '-' and '/'",
            )
    return Record(
        folder=str(run / FOLDER / f"{_next(run):03d}"),
        run=str(run),
        cwd=str(Path.cwd()),
        cluster=cluster,
        profile=profile.model_dump(mode="json"),
        nodes=nodes,
        tasks_per_node=tasks_per_node,
        max_restarts=config.resilience.max_restarts,
        max_without_progress=config.resilience.max_restarts_without_progress,
        yes=yes,
        from_scratch=from_scratch,
        time=round(time.time(), 3),
        config_digest=digest(config),
        stage=stage,
        asked=dict(asked),
    )


def write_record(record: Record, config: Config) -> None:
    """Create the launch folder: code, configuration, environment, and the record last.

    Raises:
        LaunchError: the folder exists, because this run is being launched twice at the same time; or mmscale's own code
            does not parse.
    """
    folder = Path(record.folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(
            mode=0o700
        )  # submitit's pickles will be stored there: a user who can write there can run code as this user
    except FileExistsError:
        raise LaunchError(f"{folder} exists: is this run being launched twice?", remedy="try again") from None
    if record.checked_profile().share == "group":
        folder.chmod(stat.S_IMODE(folder.stat().st_mode) | 0o050)  # setgid, which a shared folder has, stays
    try:
        snapshot.write(record.code)
    except LaunchError:
        remove(record)
        raise
    record.config.write_text(dump(config))
    _write_json(folder / "environment.json", describe())
    _write_json(folder / RECORD, asdict(record))


def remove(record: Record) -> None:
    """Remove the folder of a launch that SLURM refused, and the run's folder if it is otherwise empty."""
    folder = Path(record.folder)
    shutil.rmtree(folder)
    for left in (folder.parent, Path(record.run)):
        with contextlib.suppress(OSError):  # not empty
            left.rmdir()


def python_variables(record: Record, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables that make Python import the snapshot first.

    Without SAFEPATH `python -m` would search the working directory first.

    Args:
        record: of the launch.
        environ: its PYTHONPATH comes after the snapshot.
    """
    path = [str(record.code), *filter(None, [environ.get("PYTHONPATH", "")])]
    return {"PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}


def read_record(folder: Path) -> Record:
    """The record in a launch folder.

    Raises:
        LaunchError: there is none.
    """
    try:
        return bounded.read_record(Record, folder / RECORD)
    except (OSError, ValueError) as error:
        raise LaunchError(f"{folder} is no launch folder: {error}", remedy="launch again: `mmscale launch`") from None


def latest(run: Path) -> Path | None:
    """The newest launch folder of a run, or of a stage."""
    folders = [entry for entry in (run / FOLDER).glob("[0-9]*") if (entry / RECORD).is_file()]
    return max(folders, key=lambda entry: int(entry.name), default=None)


def check_folder(run: Path) -> None:
    """Refuse the folder of a run that does not exist.

    Raises:
        LaunchError: it does not.
    """
    if not run.is_dir():
        raise LaunchError(no_folder(run), remedy=NAME_ANOTHER)


def set_job(folder: Path, job: JobKey, *, log: str = "") -> None:
    """Record the job of a launch.

    Args:
        folder: of the launch.
        job: its job.
        log: file that the job prints to; tasks of an array print to the folder of its first launch.
    """
    _write_json(folder / JOB, {"job": job.id, "time": round(time.time(), 3), **asdict(job), "log": log})


def add_job(folder: Path, job: JobKey, *, log: str = "") -> None:
    """Record a job that continues where the earlier jobs of the launch end."""
    found = bounded.read_object(folder / JOB)
    later = [one for one in found.get(LATER, []) if one["id"] != job.id]
    _write_json(folder / JOB, found | {LATER: [*later, {**asdict(job), "log": log}]})


def job_log(folder: Path, job: str) -> Path | None:
    """The file that a job of a launch prints to; None if there is none yet, or it is unknown."""
    name = next((str(one.get("log", "")) for one in _jobs(folder) if one.get("id") == job), "")
    return Path(name) if name and Path(name).is_file() else None


def keys_of(folder: Path) -> list[JobKey]:
    """The jobs of a launch, in order; empty if it was not submitted or is local."""
    found = []
    for one in _jobs(folder):
        with contextlib.suppress(KeyError, LaunchError):
            number = checked(str(one["id"]))
            found.append(JobKey(number, *(str(one.get(name, "")) for name in ("cluster", "name", "submitted"))))
    return found


def can_submit_again(folder: Path) -> bool:
    """Whether mmscale wrote the batch script of a launch; a user's own script cannot be submitted again."""
    return any(one.get("log") for one in _jobs(folder))


def _jobs(folder: Path) -> list[dict[str, Any]]:
    try:
        found = bounded.read_object(folder / JOB)
        jobs = [{"id": found["job"], **found}, *found.get(LATER, [])]
    except (FileNotFoundError, *bounded.BAD_CONTENT):
        return []
    return [job for job in jobs if isinstance(job, dict)]


def ask_stop(folder: Path) -> None:
    """Record the request to stop this launch for good, before any job is signalled."""
    _write_json(folder / STOP, {"time": round(time.time(), 3)})


def stop_asked(folder: Path) -> bool:
    """Whether a stop of this launch was requested."""
    return (folder / STOP).exists()


def _next(run: Path) -> int:
    names = [entry.name for entry in (run / FOLDER).glob("[0-9]*")] if run.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=0) + 1


def _write_json(file: Path, content: Any) -> None:
    write_atomic(file, json.dumps(content, indent=1, default=str) + "\n")
