"""Entry point of jobs with a hand-written batch script.

`python -m launch.batch CONFIG [key=value ...] [--stage NAME] [--yes] [--from-scratch]` in a batch script that the user
wrote: the same job without submitit. slurm/train.sbatch calls it. sbatch determines nodes and ranks; node checks,
cordon file and the way to start ranks come from the profile that MMSCALE_CLUSTER names, if any.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from launch import container
from launch import record as records
from launch.profile import Profile, load_profile
from mmscale.config.load import load
from mmscale.errors import MmscaleError, UsageError
from mmscale.train.stages.table import MAIN, STAGES

_FLAGS = {"--yes": "yes", "--from-scratch": "from_scratch"}


def main(arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> NoReturn:
    """Run as the job's supervisor, or exit with the status of an error."""
    try:
        folder = _folder(arguments, environ)
    except MmscaleError as error:
        sys.stderr.write(f"error: {error.cause}\n" + (f"  fix: {error.remedy}\n" if error.remedy else ""))
        sys.exit(error.exit_status)
    record = records.read_record(folder)
    # A new interpreter, so that the supervisor also runs the snapshot's code; the process and its signal handling stay
    # the same.
    variables = {**environ, **records.python_variables(record)}
    os.execve(record.python, [record.python, "-u", "-m", "launch.job", str(folder)], variables)  # noqa: S606


def _folder(arguments: Sequence[str], environ: Mapping[str, str]) -> Path:
    """The launch folder of this job, made at its first start and reused by restarts, so later edits have no effect."""
    if "SLURM_JOB_ID" not in environ or not arguments:
        raise UsageError(
            "python -m launch.batch CONFIG [key=value ...] [--stage NAME] runs in a batch script of SLURM",
            remedy="sbatch --nodes=2 --ntasks-per-node=8 slurm/train.sbatch CONFIG [key=value ...] [--stage NAME]",
        )
    config_file, overrides, stage, flags = _parsed(arguments)
    config = load(config_file, overrides)
    run = STAGES[stage].folder(Path(config.run.dir) / config.run.name)
    number, count = environ["SLURM_JOB_ID"], environ.get("SLURM_JOB_NUM_NODES", "1")
    for folder in (run / records.FOLDER).absolute().glob("[0-9]*"):
        if number in [key.id for key in records.keys_of(folder)]:
            return folder
    nodes, ranks = int(count), int(environ.get("SLURM_NTASKS", count))
    if ranks % nodes:
        raise UsageError(f"{ranks} tasks on {nodes} nodes", remedy="ask for --ntasks-per-node instead of --ntasks")
    STAGES[stage].preflight(config, world_size=ranks, **flags)
    tasks = ranks // nodes
    cluster = environ.get("MMSCALE_CLUSTER", "")
    profile = load_profile(cluster) if cluster else Profile(tasks_per_node=tasks)
    if profile.scheduler != "slurm":
        raise UsageError(f"MMSCALE_CLUSTER={cluster} is not a profile of SLURM", remedy="name one that is, or unset it")
    cpus = int(environ.get("SLURM_CPUS_PER_TASK", "1"))
    asked = {"tasks_per_node": tasks, "cpus_per_task": cpus}
    if gpus := environ.get("SLURM_GPUS_ON_NODE"):  # GPUs may be in use without being allocated by SLURM
        asked["gpus_per_node"] = int(gpus)
    profile = profile.model_copy(update=asked)
    cluster = cluster or "sbatch"
    record = records.plan_record(
        config,
        cluster=cluster,
        profile=profile,
        nodes=nodes,
        tasks_per_node=tasks,
        stage=stage,
        yes=flags["yes"],
        from_scratch=flags["from_scratch"],
    )
    container.check(record, profile, config)
    records.write_record(record, config)
    records.set_job(Path(record.folder), records.JobKey(number, cluster=environ.get("SLURM_CLUSTER_NAME", "")))
    return Path(record.folder)


def _parsed(arguments: Sequence[str]) -> tuple[str, list[str], str, dict[str, bool]]:
    """Configuration, overrides, stage, and the flags of `mmscale launch` with the same names."""
    rest = [argument for argument in arguments if argument not in _FLAGS]
    stage = MAIN
    if "--stage" in rest:
        place = rest.index("--stage")
        stage = next(iter(rest[place + 1 : place + 2]), "")
        del rest[place : place + 2]
    if stage not in STAGES or not rest:
        raise UsageError(
            f"{' '.join(arguments)}: no configuration, or --stage {stage!r} is no stage",
            remedy=f"CONFIG [key=value ...] [--stage {'|'.join(STAGES)}] {' '.join(f'[{flag}]' for flag in _FLAGS)}",
        )
    return rest[0], rest[1:], stage, {name: flag in arguments for flag, name in _FLAGS.items()}


if __name__ == "__main__":
    main(sys.argv[1:])
