"""Discovery of the rank environment.

Reads this process's rank, the number of ranks and the address of rank 0 from the environment variables of torchrun,
SLURM or MPI. It starts nothing and imports no torch, so `mmscale doctor` and every `--help` may use it.

The innermost launcher takes precedence: torchrun's variables (which `mmscale train --nproc N` sets too), then a SLURM
step (`srun`), then `mpirun`, then a single process. If two launchers disagree that is an error: ranks that wait for
missing peers would waste node-hours. `MMSCALE_LAUNCHER=torchrun|slurm|mpi|single` overrides the discovery.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from mmscale.errors import ConfigError

Source = Literal["slurm", "torchrun", "mpi", "local", "single"]

# Below Linux's ephemeral ports (32768 and above), which outgoing connections of any program may use.
_FIRST_PORT, _PORTS = 20_000, 10_000

# Rank 0's file descriptor of a socket that already listens on MASTER_PORT; set by its parent process.
STORE_FD = "MMSCALE_STORE_FD"
GRACE_S = 60.0
GRACE = "MMSCALE_GRACE"  # time for a save after a stop request, set by the launcher [s]
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class RankEnv:
    """Place of this process among all ranks of a run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # index on this node
    local_world_size: int = 1  # ranks on this node
    master_addr: str = "127.0.0.1"  # host of rank 0
    master_port: int = 0  # 0 only for a single process, which needs no rendezvous
    source: Source = "single"
    store_fd: int | None = None  # for rank 0, a socket that already listens on master_port; None: rank 0 opens one

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"{self.source}: rank {self.rank} is not below the world size {self.world_size}")
        if not 0 <= self.local_rank < self.local_world_size <= self.world_size:
            raise ConfigError(
                f"{self.source}: local rank {self.local_rank}, {self.local_world_size} ranks on this node and "
                f"world size {self.world_size} do not fit together",
                remedy="they must satisfy local rank < ranks on this node <= world size",
            )

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which prints and logs."""
        return self.rank == 0

    def facts(self) -> dict[str, int | str]:
        """Fields of the event of an attempt's start: the number of ranks, and what started them."""
        return {"world_size": self.world_size, "ranks_by": self.source}

    @property
    def init_method(self) -> str:
        """URL of the rendezvous for torch.distributed."""
        return f"tcp://{self.master_addr}:{self.master_port}"


@dataclass(frozen=True)
class Rendezvous:
    """The data that MPI ranks exchange before torch.distributed is initialised."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    store_fd: int | None = None


def discover(environ: Mapping[str, str] | None = None) -> RankEnv:
    """Read the rank environment of this process.

    Args:
        environ: Variables to read; those of the process if None.

    Raises:
        ConfigError: Variables are missing, are not numbers, or two launchers disagree.
    """
    environ = os.environ if environ is None else environ
    choice = environ.get("MMSCALE_LAUNCHER", "")
    if choice and choice not in get_args(Source):
        raise ConfigError(
            f"MMSCALE_LAUNCHER={choice!r} is not a launcher", remedy=f"use one of {', '.join(get_args(Source))}"
        )
    if choice in ("torchrun", "local") or (not choice and ("RANK" in environ or "WORLD_SIZE" in environ)):
        return _from_torchrun(environ, source="local" if choice == "local" else "torchrun")
    if choice == "slurm" or (not choice and _in_slurm_step(environ)):
        env = _from_slurm(environ)
        if not choice:
            _check_mpi_agrees(environ, env)
        return env
    if choice == "mpi" or (not choice and _mpi_names(environ) is not None):
        return _from_mpi(environ)
    if not choice:
        _check_not_in_batch_script(environ)
    return RankEnv()


def _number(environ: Mapping[str, str], name: str, source: str) -> int:
    text = environ.get(name, "")
    if not re.fullmatch(r"\s*\d+\s*", text):
        said = f"{name} is not set" if name not in environ else f"{name}={text!r} is not a whole number"
        raise ConfigError(
            f"{source}: {said}", remedy="start ranks with a launcher that sets it, or unset its variables"
        )
    return int(text)


# --- torchrun, and everything that speaks its language --------------------------------------------------------------


def _from_torchrun(environ: Mapping[str, str], *, source: Source) -> RankEnv:
    missing = [name for name in _TORCHRUN if name not in environ]
    if missing:
        present = [name for name in _TORCHRUN if name in environ]
        raise ConfigError(
            f"{source}: {', '.join(present) or 'MMSCALE_LAUNCHER'} set but not {', '.join(missing)}",
            remedy="start with torchrun or `mmscale train --nproc N`, set all of them, or unset those that are set",
        )
    return RankEnv(
        rank=_number(environ, "RANK", source),
        world_size=_number(environ, "WORLD_SIZE", source),
        local_rank=_number(environ, "LOCAL_RANK", source),
        local_world_size=_number(environ, "LOCAL_WORLD_SIZE", source),
        master_addr=environ["MASTER_ADDR"],
        master_port=_number(environ, "MASTER_PORT", source),
        store_fd=_number(environ, STORE_FD, source) if source == "local" and environ.get(STORE_FD) else None,
        source=source,
    )


# --- SLURM ----------------------------------------------------------------------------------------------------------


def _in_slurm_step(environ: Mapping[str, str]) -> bool:
    """Whether `srun` started this process. A batch script has SLURM_PROCID=0 too, but no step."""
    return "SLURM_PROCID" in environ and ("SLURM_STEP_ID" in environ or "SLURM_STEPID" in environ)


def _check_not_in_batch_script(environ: Mapping[str, str]) -> None:
    tasks = environ.get("SLURM_NTASKS", "1")
    if "SLURM_PROCID" in environ and tasks.isdigit() and int(tasks) > 1:
        raise ConfigError(
            f"slurm: the batch script of a job with {tasks} tasks runs this command once, not {tasks} times",
            remedy="put `srun` before it, or set MMSCALE_LAUNCHER=single to train in one process",
        )


def _from_slurm(environ: Mapping[str, str]) -> RankEnv:
    size_name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    nodes_name = "SLURM_STEP_NODELIST" if "SLURM_STEP_NODELIST" in environ else "SLURM_JOB_NODELIST"
    tasks_name = "SLURM_STEP_TASKS_PER_NODE" if "SLURM_STEP_TASKS_PER_NODE" in environ else "SLURM_TASKS_PER_NODE"
    hosts = expand_hostlist(environ.get(nodes_name, ""))
    address = environ.get("MASTER_ADDR") or (hosts[0] if hosts else "")
    if not address:
        raise ConfigError("slurm: SLURM_STEP_NODELIST and SLURM_JOB_NODELIST are both empty", remedy="set MASTER_ADDR")
    if environ.get("MASTER_PORT"):
        port = _number(environ, "MASTER_PORT", "slurm")
    else:
        step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID", "0"))
        port = port_of_job(_number(environ, "SLURM_JOB_ID", "slurm"), step=int(step) if step.isdigit() else 0)
    local_rank = _number(environ, "SLURM_LOCALID", "slurm")
    world_size = _number(environ, size_name, "slurm")
    node = _number(environ, "SLURM_NODEID", "slurm") if "SLURM_NODEID" in environ else 0
    per_node = expand_tasks_per_node(environ.get(tasks_name, ""))
    return RankEnv(
        rank=_number(environ, "SLURM_PROCID", "slurm"),
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=per_node[node] if node < len(per_node) else max(1, world_size // max(1, len(hosts))),
        master_addr=address,
        master_port=port,
        source="slurm",
    )


def port_of_job(job_id: int, *, step: int = 0) -> int:
    """A port that all ranks of a step compute alike, and that other jobs and steps on the same node rarely use."""
    return _FIRST_PORT + (job_id * 31 + step) % _PORTS


def unused_port() -> int:
    """A port of the same range that is free on this machine now, for a process that starts all ranks of a step.

    A port computed from the job's number would be the same after a requeue, when a rank of the previous start may still
    use it, and could collide with another cluster's on one machine; rank 0 then ends with "address already in use".

    Raises:
        ConfigError: there is none.
    """
    begin = secrets.randbelow(_PORTS)
    for number in range(_PORTS):
        port = _FIRST_PORT + (begin + number) % _PORTS
        with socket.socket() as listener, contextlib.suppress(OSError):
            # As in torch.distributed's server: remaining connections of an ended process do not block the port.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("", port))
            listener.listen(1)
            return port
    raise ConfigError(f"no port of {_FIRST_PORT} to {_FIRST_PORT + _PORTS - 1} is free", remedy="set MASTER_PORT")


def expand_hostlist(text: str) -> list[str]:
    """`"n[1-2,07],login"` -> `["n1", "n2", "n07", "login"]`, by `scontrol show hostnames` if it is available.

    Raises:
        ConfigError: Brackets do not match or a range is invalid.
    """
    hosts: list[str] = []
    for item in re.findall(r"(?:\[[^\]]*\]|[^,\[\]])+|[\[\]]", text.strip()):
        names = [""]
        for plain, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", item):
            names = [name + end for name in names for end in ([plain] if plain else _expand_ranges(ranges, text))]
        if ("[" in item and "]" not in item) or item in "[]":
            raise ConfigError(f"slurm: host list {text!r} has a bracket without its partner")
        hosts += names
    return hosts


def _expand_ranges(ranges: str, text: str) -> list[str]:
    numbers: list[str] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            raise ConfigError(f"slurm: host list {text!r} has {part!r} where a number or a range belongs")
        first, last = match[1], match[2] or match[1]
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def expand_tasks_per_node(text: str) -> list[int]:
    """`"2(x3),1"` -> `[2, 2, 2, 1]`: ranks on each node of the step."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


# --- MPI ------------------------------------------------------------------------------------------------------------


def _mpi_names(environ: Mapping[str, str]) -> tuple[str, str] | None:
    """Names of the rank and size variables of the MPI that started this process."""
    for names in (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE")):
        if all(name in environ for name in names):
            return names
    return None


def _check_mpi_agrees(environ: Mapping[str, str], env: RankEnv) -> None:
    """Compare with SLURM's variables: an `mpirun` in a SLURM job sets both, but its ranks are not SLURM's tasks."""
    names = _mpi_names(environ)
    if names is None:
        return
    rank, size = (_number(environ, name, "mpi") for name in names)
    if (rank, size) != (env.rank, env.world_size):
        raise ConfigError(
            f"this process is rank {env.rank} of {env.world_size} by SLURM and rank {rank} of {size} by {names[0]}",
            remedy="set MMSCALE_LAUNCHER=mpi if mpirun started the ranks, MMSCALE_LAUNCHER=slurm if srun did",
        )


def _from_mpi(environ: Mapping[str, str]) -> RankEnv:
    names = _mpi_names(environ)
    if names is None:
        raise ConfigError("mpi: neither OMPI_COMM_WORLD_RANK nor PMI_RANK is set", remedy="start with mpirun")
    rank, size = (_number(environ, name, "mpi") for name in names)
    if size == 1:
        return RankEnv(source="mpi")
    met = rendezvous_by_mpi4py()
    if (met.rank, met.world_size) != (rank, size):
        raise ConfigError(
            f"mpirun started rank {rank} of {size}, but mpi4py sees rank {met.rank} of {met.world_size}",
            remedy="mpi4py was built for another MPI: install the one whose mpirun you use, or start with torchrun",
        )
    given = environ.get("MASTER_PORT")
    return RankEnv(
        rank=rank,
        world_size=size,
        local_rank=met.local_rank,
        local_world_size=met.local_world_size,
        master_addr=environ.get("MASTER_ADDR") or met.master_addr,
        master_port=_number(environ, "MASTER_PORT", "mpi") if given else met.master_port,
        source="mpi",
        store_fd=None if given else met.store_fd,
    )


def rendezvous_by_mpi4py() -> Rendezvous:
    """Rank 0 opens a port and sends it and its host name to all ranks; ranks of a host determine their local ranks.

    Raises:
        ConfigError: mpi4py is not installed.
    """
    try:
        # Importing it calls MPI_Init, so it must not be imported in processes that are not MPI ranks.
        from mpi4py import MPI
    except ImportError as error:
        raise ConfigError(
            "mpirun started this process, but mpi4py is not installed", remedy="pip install 'mmscale[mpi]'"
        ) from error
    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    listener = listen() if world.rank == 0 else None
    address = (socket.gethostname(), port_of(listener)) if listener is not None else None
    host, port = world.bcast(address, root=0)
    same_host = node.size == world.size
    found = Rendezvous(
        world.rank,
        world.size,
        node.rank,
        node.size,
        "127.0.0.1" if same_host else host,
        port,
        store_fd=listener.detach() if listener is not None else None,
    )
    node.Free()
    return found


def listen() -> socket.socket:
    """A socket that listens on a port of the system's choice.

    The process that starts ranks opens it and passes it to rank 0, so no other process can take the port in between.
    """
    listener = socket.socket()
    listener.bind(("", 0))
    listener.listen(1024)
    return listener


def port_of(listener: socket.socket) -> int:
    """The port that a socket listens on."""
    return int(listener.getsockname()[1])


def grace_of(given: float | None, environ: Mapping[str, str] = os.environ) -> float:
    """The time for a save after a stop request: the given value, or the launcher's, or a minute.

    Raises:
        ConfigError: the launcher's value is not a number.
    """
    text = environ.get(GRACE, "")
    if given is not None or not text:
        return GRACE_S if given is None else given
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{GRACE}={text} is no number", remedy=f"unset {GRACE}, or set it to seconds") from None
