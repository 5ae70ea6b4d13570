"""Runs ranks, agents and node checks in a container.

The command between srun and Python that runs a task in a container. A pure function of the launch.

The supervisor of a job runs outside the container, because it needs SLURM's commands and no torch. Every step that it
starts (node checks, all-reduces, ranks or agents) runs the image's Python with the launch's code snapshot. The run's
folder and the working directory are always mounted at the same paths. Everything else that a run reads must be in
`mounts`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from launch.profile import Container, Profile
from launch.record import Record
from mmscale.config import Config
from mmscale.errors import ConfigError, UsageError

# Variables of the host's Python: with them another Python fails to start, or imports the host's packages.
_UNSET = ("PYTHONHOME", "PYTHONUSERBASE", "PYTHONSTARTUP")
_SEPARATORS = ",:"  # separators of mount lists


class _Start(NamedTuple):
    """How a runtime is started.

    Attributes:
        srun: arguments of srun.
        command: prefix of the program.
    """

    srun: list[str]
    command: list[str]


def _pyxis(container: Container, mounts: Sequence[str], workdir: str, *, gpus: bool) -> _Start:
    """NVIDIA's plugin for srun, which starts enroot. The image requests its devices (NVIDIA_VISIBLE_DEVICES)."""
    arguments = [
        f"--container-image={container.image}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={workdir}",
    ]
    return _Start([*arguments, *container.options], [])


def _apptainer(container: Container, mounts: Sequence[str], workdir: str, *, gpus: bool) -> _Start:
    """A program that each task starts. SingularityCE takes the same arguments."""
    arguments = [*(["--nv"] if gpus else []), f"--bind={','.join(mounts)}", f"--pwd={workdir}"]
    return _Start([], [container.runtime, "exec", *arguments, *container.options, container.image])


_RUNTIMES: Mapping[str, Callable[..., _Start]] = {
    "pyxis": _pyxis,
    "apptainer": _apptainer,
    "singularity": _apptainer,
}


def task(record: Record, profile: Profile, arguments: Sequence[str]) -> list[str]:
    """Arguments after srun's own: those of the profile and of the container runtime, then the command of the task.

    Args:
        record: of the launch.
        profile: of the cluster.
        arguments: of Python, e.g. -m mmscale train ...
    """
    container = profile.container
    if container is None:
        return [*profile.srun, record.python, *arguments]
    workdir = container.workdir or record.cwd
    start = _RUNTIMES[container.runtime](container, _mounts(container, record), workdir, gpus=profile.gpus_per_node > 0)
    return [*profile.srun, *start.srun, *start.command, *_python(container, record, profile), *arguments]


def _python(container: Container, record: Record, profile: Profile) -> list[str]:
    """The image's interpreter, started by its own `env`, because variables of an image would override the given ones.

    PYTHONPATH of the shell refers to the host and is dropped; the profile's is kept.
    """
    own = profile.environment.get("PYTHONPATH")
    path = [str(record.code), *([own.value] if own is not None else [])]
    variables = {"PYTHONPATH": ":".join(path), "PYTHONSAFEPATH": "1", "PYTHONNOUSERSITE": "1"}
    unset = [f"--unset={name}" for name in _UNSET]
    return ["env", *unset, *(f"{name}={value}" for name, value in variables.items()), container.python]


def _mounts(container: Container, record: Record) -> list[str]:
    """SOURCE:TARGET[:ro] of everything that is mounted."""
    own = [Path(record.cwd), record.main_run]
    wanted = [path for path in own if not any(other != path and path.is_relative_to(other) for other in own)]
    given = [":".join(filter(None, mount)) for mount in map(_split, container.mounts)]
    return list(dict.fromkeys([*given, *(f"{path}:{path}" for path in wanted)]))


def _split(mount: str) -> tuple[str, str, str]:
    """Source, target and flags of a mount; without a target the source path is used."""
    source, target, flags = (*mount.split(":"), "", "")[:3]
    return source, target or source, flags if flags != "rw" else ""


def check(record: Record, profile: Profile, config: Config) -> None:
    """Refuse, before the job is queued, what would fail in the container.

    Raises:
        ConfigError: the image does not exist, or data is not mounted.
        UsageError: a folder cannot be mounted.
    """
    container = profile.container
    if container is None:
        return
    for path in (record.cwd, str(record.main_run)):
        if bad := sorted(set(_SEPARATORS) & set(path)):
            raise UsageError(
                f"{path!r} has {' '.join(map(repr, bad))} and cannot be mounted in a container",
                remedy="choose a path without commas and colons",
            )
    image = Path(container.image)
    # A folder that does not exist here may exist on the nodes.
    if image.is_absolute() and image.parent.is_dir() and not image.exists():
        raise ConfigError(f"container.image: there is no {image}", remedy="import it: docs/containers.md says how")
    targets = [PurePosixPath(mount.split(":")[1]) for mount in _mounts(container, record)]
    for source in config.data.sources:
        data = PurePosixPath(Path(record.cwd) / source.path)
        if not any(data.is_relative_to(target) for target in targets):
            raise ConfigError(
                f"data {data} is not mounted in the container of the profile {record.cluster}",
                remedy=f"container: {{mounts: [{data}:{data}:ro]}}",
            )
