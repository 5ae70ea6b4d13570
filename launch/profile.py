"""Cluster profiles.

Reads configs/cluster/NAME.yaml, which describes a cluster and the request for nodes. Checked strictly; no torch, no
SLURM. Values that can reach a shell line contain no shell syntax, and are quoted as well.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from launch import cordon
from mmscale.config import document as documents
from mmscale.config.section import Count, Index, Positive, Rate, Seconds, Section, setting
from mmscale.config.validate import dotted, validate
from mmscale.errors import ConfigError

FOLDER = Path("configs/cluster")
BUILT_IN = ("local", "debug")
ASKED = ("time", "partition", "account", "qos")  # settings that the command line may replace
_MOST_PROBLEMS = 50  # in one message
_SHOWN = 60  # characters of a wrong value that are shown
# Variables that are never passed to jobs through `environment`.
SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY", re.IGNORECASE)
# Options of sbatch that the launcher sets, with the setting to use instead.
_NOT_FOR_SBATCH = {
    **{name: f"use `{name}` of the profile" for name in ("account", "constraint", "exclude", "exclusive", "partition")},
    **{name: f"use `{name}` of the profile" for name in ("qos", "reservation", "time")},
    "nodes": "use `nodes` of the profile or --nodes",
    "ntasks": "use `nodes` and `tasks_per_node`",
    "ntasks-per-node": "use `tasks_per_node`",
    "cpus-per-task": "use `cpus_per_task`",
    "gpus": "use `gpus_per_node`",
    "gpus-per-node": "use `gpus_per_node`",
    "gpus-per-task": "use `gpus_per_node`",
    "mem": "use `memory_gb`",
    "dependency": "use --after",
    "array": "use --sweep",
    "signal": "use `signal_delay`",
    "requeue": "use `requeue` of the profile",
    "no-requeue": "use `requeue: false` of the profile",
    "job-name": "use run.name",
    **dict.fromkeys(
        ("chdir", "output", "error", "open-mode", "wrap", "export", "parsable", "test-only"), "leave it out"
    ),
}
_PLAIN = r"^[A-Za-z0-9][A-Za-z0-9._+@:-]*$"

Plain = Annotated[str, Field(pattern=_PLAIN, max_length=200)]
Nodes = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._,\[\]-]*$", max_length=2000)]
Constraint = Annotated[str, Field(pattern=r"^[A-Za-z0-9\[(][A-Za-z0-9._:,&|*\[\]()-]*$", max_length=200)]
# One line without shell expansion: these become arguments, not shell text.
Argument = Annotated[str, Field(pattern=r"^[A-Za-z0-9._+@:,=/%~\[\]-]+$", max_length=1000)]
Image = Annotated[str, Field(pattern=r"^[A-Za-z0-9/.][A-Za-z0-9._+@:=/%~#-]*$", max_length=1000)]
Mount = Annotated[str, Field(pattern=r"^/[A-Za-z0-9._+@=/%~-]*(:/[A-Za-z0-9._+@=/%~-]*(:(ro|rw))?)?$", max_length=1000)]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=100)]
# Shell lines of the user; a line break would hide a second command.
Line = Annotated[str, Field(pattern=r"^[^\r\n\x00]+$", max_length=2000)]


def _minutes(value: Any) -> Any:
    """Minutes from SLURM's formats (30, 12:30:00, 2-00:00:00) and from 90m, 12h, 2d."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    units = {"m": 1, "h": 60, "d": 1440}
    if text[-1:] in units and text[:-1].isdigit():
        return int(text[:-1]) * units[text[-1]]
    days, dash, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in parts) or (days and not days.isdigit()) or len(parts) > 3:
        return value
    numbers = [int(part) for part in parts]
    if dash:  # days-hours[:minutes[:seconds]]
        hours, minutes = (*numbers, 0)[:2]
        return int(days) * 1440 + hours * 60 + minutes
    if len(numbers) == 3:
        return numbers[0] * 60 + numbers[1]
    return numbers[0]


Minutes = Annotated[Count, Field(le=366 * 1440), BeforeValidator(_minutes)]


class EnvironmentVariable(Section):
    """A variable of the job, with the reason for setting it."""

    value: Line = setting("Its value.")
    reason: Line = setting("Why it is set: the next reader wants to know whether it may go.")


class Secret(Section):
    """The source of a job's secret. The value is never in a script, a log or a record."""

    env: Variable | None = setting("Variable of the submitting shell.", None)
    file: Annotated[str, Field(pattern=r"^[^\r\n\x00]+$")] | None = setting(
        "File that the job reads, on a file system that its first node sees.", None
    )

    @model_validator(mode="after")
    def _one(self) -> Secret:
        if (self.env is None) == (self.file is None):
            raise ValueError("a secret has either env or file")
        return self


class Container(Section):
    """The image that ranks and node checks run in."""

    image: Image = setting("A file (.sqsh of enroot, .sif or a folder of apptainer), or what the runtime can pull.")
    runtime: Literal["pyxis", "apptainer", "singularity"] = setting(
        "What starts it: NVIDIA's plugin of srun, or a program of the nodes.", "pyxis"
    )
    python: Argument = setting("Interpreter inside; it needs mmscale's dependencies.", "python3")
    mounts: tuple[Mount, ...] = setting(
        "SOURCE[:TARGET[:ro|rw]] each; the run's folder and the working directory are mounted anyway.", ()
    )
    workdir: Argument | None = setting("Working directory inside; default: the one that was launched from.", None)
    options: tuple[Argument, ...] = setting(
        "More arguments: of srun with pyxis, of `apptainer exec` or `singularity exec` else.", ()
    )


# CHECKS of slurm/preflight.py, which mypy cannot take as a Literal.
Check = Literal[
    "gpus",
    "gpu_idle",
    "gpu_memory_errors",
    "gpu_xid",
    "disk",
    "shared_memory",
    "run_folder",
    "python",
    "clock",
    "all_reduce",
]


class Preflight(Section):
    """Checks of every node before ranks start."""

    disk_gb: Rate = setting("Free space in the run folder's file system.", 1.0, unit="GB")
    shared_memory_gb: Rate = setting("Free space in /dev/shm.", 0.1, unit="GB")
    all_reduce_mb: Positive = setting("Size of the all-reduces that are measured.", 64.0, unit="MB")
    all_reduce_inside_gb_s: Rate = setting(
        "Bus bandwidth of an all-reduce over a node's ranks; 0: measured and printed, nothing is demanded.",
        0.0,
        unit="GB/s",
    )
    all_reduce_between_gb_s: Rate = setting(
        "The same over the ranks of two nodes, which a node must reach with one of its two neighbours.",
        0.0,
        unit="GB/s",
    )
    skip: dict[Check, Line] = setting("Checks that are turned off, and why each.", {})


class Profile(Section):
    """The settings of one cluster, or of one way to use it."""

    scheduler: Literal["slurm", "local", "debug"] = setting("Who starts the ranks.", "slurm")
    partition: Plain | None = setting("SLURM partition.", None)
    account: Plain | None = setting("SLURM account.", None)
    qos: Plain | None = setting("SLURM quality of service.", None)
    reservation: Plain | None = setting("SLURM reservation.", None)
    constraint: Constraint | None = setting("Features that nodes must have, e.g. 'h100&ib'.", None)
    nodes: Count = setting("Nodes, unless --nodes says otherwise.", 1, unit="nodes")
    tasks_per_node: Count | None = setting("Ranks on a node; default: one per GPU.", None, unit="ranks")
    ranks: Literal["srun", "torchrun"] = setting(
        "Who starts ranks: srun each of them; or one torchrun per node, which starts them again in place after a crash "
        "(seconds instead of a new step, but the allocation is not examined again).",
        "srun",
    )
    gpus_per_node: Index = setting("GPUs on a node.", 0, unit="GPUs")
    cpus_per_task: Count = setting("CPU cores of a rank.", 1, unit="cores")
    memory_gb: Index | None = setting("Memory of a node; 0: all of it.", None, unit="GB")
    exclusive: bool = setting("No other jobs on the nodes.", False)
    time: Minutes | None = setting(
        "Time limit, e.g. 90m, 12h, 2-00:00:00; default: the partition's.", None, unit="minutes"
    )
    requeue: bool = setting("Jobs ask SLURM to start them again after time limits and preemptions.", True)
    chain: Count = setting(
        "Jobs that a launch submits, each of which waits for the end of the one before it: for sites that forbid "
        "requeue, or cancel preempted jobs.",
        1,
        unit="jobs",
    )
    replacements: Index = setting(
        "How many more jobs a launch may submit by itself, each without the nodes that were found unfit.",
        3,
        unit="jobs",
    )
    notify: Line | None = setting(
        "Shell line that is run when a run starts, has a fault, is requeued, stops, gives up or finishes; it gets "
        "facts as JSON on stdin and in variables: MMSCALE_KIND, MMSCALE_RUN, MMSCALE_WHY, ...",
        None,
    )
    signal_delay: Seconds = setting(
        "How long before the time limit ranks are asked to save; must be longer than a save.", 120.0, unit="seconds"
    )
    slurm_patience: Seconds = setting(
        "How long a job repeats a question that slurmctld does not answer; running ranks continue in the meantime.",
        1800.0,
        unit="seconds",
    )
    start_hint_after: Seconds = setting(
        "After how long the job says that its ranks have not begun yet; large checkpoints take their time.",
        300.0,
        unit="seconds",
    )
    exclude: tuple[Nodes, ...] = setting("Nodes that are never used.", ())
    cordon_file: str | None = setting("Shared file of nodes found bad, one a line; they are not used either.", None)
    cordon_expires: Seconds = setting(
        "How long a line of the cordon file counts; a line without a time does not expire.",
        14 * 86400.0,
        unit="seconds",
    )
    preflight: Preflight = setting("Checks of every node before ranks start.", Preflight())
    setup: tuple[Line, ...] = setting("Shell lines before anything else, e.g. 'module load cuda'.", ())
    environment: dict[Variable, EnvironmentVariable] = setting("Variables of the job.", {})
    keep: tuple[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*\*?$")], ...] = setting(
        "More variables of the submitting shell that the job gets; PREFIX* is allowed.", ()
    )
    share: Literal["owner", "group"] = setting(
        "Who may read runs with status, logs and report: group, whatever your umask; secrets stay the owner's.", "owner"
    )
    secrets: dict[Variable, Secret] = setting(
        "Variables with secrets, e.g. WANDB_API_KEY: {env: WANDB_API_KEY} or {file: ~/.wandb_key}.", {}
    )
    container: Container | None = setting("Run ranks and node checks in a container.", None)
    sbatch: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")], Argument | int | bool] = setting(
        "More options of sbatch, without dashes; not those that follow from other settings.", {}
    )
    srun: tuple[Argument, ...] = setting("More arguments of srun.", ())

    @model_validator(mode="after")
    def _together(self) -> Profile:
        if self.scheduler == "slurm" and self.tasks_per_node is None and self.gpus_per_node == 0:
            raise ValueError("neither gpus_per_node nor tasks_per_node says how many ranks a node has")
        if self.scheduler != "slurm" and self.ranks != "srun":
            raise ValueError(f"ranks: {self.ranks} is for scheduler: slurm, and this is {self.scheduler}")
        if self.scheduler != "slurm" and self.container is not None:
            raise ValueError(f"container is for scheduler: slurm, and this is {self.scheduler}")
        for name in self.sbatch:
            if name in _NOT_FOR_SBATCH:
                raise ValueError(f"sbatch: {name} would contradict what mmscale asks for; {_NOT_FOR_SBATCH[name]}")
        if secret := next((name for name in self.keep if SECRET.search(name) and not name.endswith("*")), None):
            raise ValueError(
                f"keep: {secret} looks like a secret, which would lie in SLURM's records; "
                f"use secrets: {{{secret}: {{env: {secret}}}}}"
            )
        if self.time is not None and self.signal_delay >= 60 * self.time:
            raise ValueError(f"signal_delay ({self.signal_delay:g} s) is not below the time limit ({self.time} min)")
        return self

    @property
    def tasks(self) -> int:
        """Ranks on a node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    def excluded(self) -> list[str]:
        """Nodes that must not be used: those listed in the profile and those found bad since."""
        return list(dict.fromkeys([*self.exclude, *self.cordoned()]))

    def cordoned(self) -> list[str]:
        """Nodes that were found bad and whose lines have not expired."""
        if self.cordon_file is None:
            return []
        return cordon.read(Path(self.cordon_file), max_age_s=self.cordon_expires)


def load_profile(name: str, asked: Mapping[str, str] = MappingProxyType({})) -> Profile:
    """The profile `configs/cluster/NAME.yaml` below the working directory, a path of one, or `local` or `debug`.

    Args:
        name: of the profile.
        asked: settings of the command line that replace the profile's (`ASKED`).

    Raises:
        ConfigError: the profile does not exist or is wrong.
    """
    file = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if name in BUILT_IN and not file.is_file():
        if asked:
            raise ConfigError(
                f"--{next(iter(asked))} is for SLURM, and --cluster {name} runs here",
                remedy="name a profile of SLURM by --cluster",
            )
        return Profile.model_validate({"scheduler": name})
    if not file.is_file():
        known = sorted({*BUILT_IN, *(entry.stem for entry in FOLDER.glob("*.yaml"))})
        raise ConfigError(
            f"there is no cluster profile {file} below {Path.cwd()}",
            remedy=_elsewhere(name) or f"--cluster takes {', '.join(known)} here, or a path of a YAML",
        )
    document = documents.read_file(file)
    for setting_name, value in asked.items():
        document.forget(setting_name)
        document.data[setting_name] = value
        document.marks[setting_name] = f"--{setting_name}"
    return _checked(document, where=str(file))


def _elsewhere(name: str) -> str:
    """The option that names the profile of the checkout that this package is part of; empty if there is none."""
    file = Path(__file__).parents[1] / FOLDER / f"{name}.yaml"
    return f"name its file: --cluster {shlex.quote(str(file))}" if file.is_file() else ""


def profile_of(content: Any, *, where: str) -> Profile:
    """A profile from plain data.

    Raises:
        ConfigError: it is wrong; names the place and the rule.
    """
    return _checked(documents.ConfigDocument(data=content or {}), where=where)


def _checked(document: documents.ConfigDocument, *, where: str) -> Profile:
    profile, errors = validate(Profile, document)
    if profile is not None:
        return profile
    lines: dict[str, str] = {}
    for problem in errors[:_MOST_PROBLEMS]:
        key = dotted(document, problem)
        given = "" if problem["type"] in ("missing", "value_error") else f" is {str(problem['input'])[:_SHOWN]!r}"
        place = document.where(key) or f"{where}: "
        # Pydantic reports every member of a union.
        lines.setdefault(key, f"{place}{key}{given}{': ' if key else ''}{_said(problem['type'], problem['msg'])}")
    raise ConfigError("\n".join(lines.values()), remedy=f"settings of a profile: {', '.join(Profile.model_fields)}")


def _said(kind: str, message: str) -> str:
    if kind == "string_pattern_mismatch":
        return "it has characters that do not belong there, or a shell could take it for a command"
    if kind == "extra_forbidden":
        return "no such setting"
    return message.removeprefix("Value error, ")
