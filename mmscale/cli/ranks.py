# `--nproc N`: is this process a rank already, or does it have to start the ranks?
# Starting and watching is runtime/local_ranks.py's.
"""Local ranks of a command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mmscale.errors import UsageError
from mmscale.runtime.local_ranks import run_local
from mmscale.runtime.rank_env import RankEnv, discover

_SIZES = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def starts_ranks(nproc: int | None) -> bool:
    """Whether this process is to start `nproc` local ranks instead of being one.

    Raises:
        UsageError: it is a rank of another launcher.
    """
    if nproc is None or nproc == 1 or os.environ.get("MMSCALE_LAUNCHER") == "local":
        return False
    sizes = {name: os.environ[name] for name in _SIZES if os.environ.get(name, "1") not in ("", "1")}
    if sizes:
        name, size = next(iter(sizes.items()))
        raise UsageError(
            f"--nproc {nproc} starts ranks on this machine, but this process is already one of {size} ({name}={size})",
            remedy="leave --nproc out: the ranks of SLURM, torchrun and mpirun are joined as they are",
        )
    return True


def own_rank(nproc: int | None) -> RankEnv:
    """The place of this process; `--nproc 1` is one rank, whatever job it stands in."""
    if nproc == 1 and os.environ.get("MMSCALE_LAUNCHER") != "local":
        return RankEnv()
    return discover()


def start(nproc: int, *, log_dir: Path, arguments: Sequence[str] | None = None) -> int:
    """Run this same command line as `nproc` ranks; returns their exit status."""
    return run_local(nproc, list(sys.argv[1:] if arguments is None else arguments), log_dir=log_dir)
