"""The command that starts ranks.

Builds the command that starts the ranks of a launch, and its environment. Pure functions; job.py runs the command.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from launch import agent, container
from launch.profile import Profile
from launch.record import Record
from mmscale.resilience import lease, watchdog
from mmscale.runtime.rank_env import GRACE, expand_hostlist


def command(
    record: Record, profile: Profile, *, logs: Path, environ: Mapping[str, str], port: int = 0, in_place: int = 0
) -> list[str]:
    """The command that starts all ranks.

    Args:
        record: of the launch.
        profile: of the cluster.
        logs: folder of the ranks' output.
        environ: of the job.
        port: for torchrun's agents: rendezvous port on the first node.
        in_place: for torchrun's agents: how often they may restart their ranks.
    """
    train = ["train", str(record.config), "--stage", record.stage, *(["--yes"] if record.yes else [])]
    program = ["-m", "mmscale", *train]
    if profile.scheduler != "slurm":
        return [record.python, *program, "--nproc", str(record.world_size)]
    tasks, cpus, name = record.tasks_per_node, profile.cpus_per_task, "rank"
    if profile.ranks == "torchrun":
        names = hosts(environ)
        program = agent.node_command(
            train,
            logs=logs,
            head=environ.get("MASTER_ADDR") or (names[0] if names else "localhost"),
            port=port,
            nodes=record.nodes,
            tasks=tasks,
            max_restarts=in_place,
        )
        tasks, cpus, name = 1, cpus * tasks, "agent"
    # --mpi=none: a site's default plugin may need a library that ranks do not need.
    # --cpus-per-task: since 22.05 srun does not inherit it from sbatch.
    arguments = [
        "srun",
        f"--nodes={record.nodes}",
        f"--ntasks={record.nodes * tasks}",
        f"--ntasks-per-node={tasks}",
        f"--cpus-per-task={cpus}",
        "--kill-on-bad-exit=1",
        "--wait=60",
        "--mpi=none",
        "--export=ALL",
        "--unbuffered",
        "--open-mode=append",
        f"--output={logs}/{name}_%t.log",
        f"--error={logs}/{name}_%t.log",
    ]
    return [*arguments, *container.task(record, profile, program)]


def hosts(environ: Mapping[str, str]) -> list[str]:
    """Names of a job's nodes, in SLURM's order."""
    return expand_hostlist(environ.get("SLURM_JOB_NODELIST", ""))


def environment(
    profile: Profile, environ: Mapping[str, str], *, lease_id: str, port: int, logs: Path
) -> dict[str, str]:
    """Environment variables of the ranks.

    Args:
        profile: of the cluster.
        environ: of the job.
        lease_id: of the attempt.
        port: of the rendezvous on the first node, unless the profile sets MASTER_PORT.
        logs: folder of the ranks' output; NCCL's dumps of collectives that time out go there too.
    """
    recorder = {
        "TORCH_FR_BUFFER_SIZE": "512",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": str(logs / watchdog.FOLDER / "nccl_"),
    }
    found = {**recorder, **environ, lease.VARIABLE: lease_id}
    if profile.scheduler == "slurm":
        found["MMSCALE_LAUNCHER"] = "torchrun" if profile.ranks == "torchrun" else "slurm"
        found.setdefault("MASTER_PORT", str(port))
        found.setdefault(GRACE, f"{profile.signal_delay:g}")
    return found
