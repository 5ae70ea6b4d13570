"""Starts the local ranks of a command.

`--nproc N`: decides whether this process is already a rank or must start the ranks. runtime/local_ranks.py starts and
supervises them.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from mmscale.errors import UsageError
from mmscale.runtime.local_ranks import run_local
from mmscale.runtime.rank_env import RankEnv, discover

OnRanks = Annotated[
    int | None,
    typer.Option(
        "--nproc",
        metavar="N",
        min=1,
        show_default=False,
        help="Share a run's model among N ranks of this machine (TP).",
    ),
]
_SIZES = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def starts_ranks(nproc: int | None) -> bool:
    """Whether this process must start `nproc` local ranks instead of being a rank.

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
            remedy="leave --nproc out: ranks of SLURM, torchrun and mpirun need no further ones",
        )
    return True


def is_shared(nproc: int | None) -> bool:
    """Whether this process is one of several ranks that share a model. They agree on what to read, and rank 0 reads."""
    return not starts_ranks(nproc) and shared(nproc) is not None


def own_rank(nproc: int | None) -> RankEnv:
    """The rank of this process. `--nproc 1` is a single rank, in any job."""
    if nproc == 1 and os.environ.get("MMSCALE_LAUNCHER") != "local":
        return RankEnv()
    return discover()


def start(
    nproc: int, *, log_dir: Path, arguments: Sequence[str] | None = None, environ: Mapping[str, str] | None = None
) -> int:
    """Run this same command line as `nproc` ranks; returns their exit status."""
    return run_local(nproc, list(sys.argv[1:] if arguments is None else arguments), log_dir=log_dir, environ=environ)


def start_for_a_while(nproc: int | None) -> int:
    """As `start`, for commands that keep logs only if a rank crashes."""
    assert nproc is not None
    logs = Path(tempfile.mkdtemp(prefix="mmscale-ranks-"))
    status = start(nproc, log_dir=logs)
    shutil.rmtree(logs)  # not reached after a crash; then the logs are kept and the error names them
    return status


def shared(nproc: int | None) -> RankEnv | None:
    """The rank of this process among ranks that share a model; None for a single process, in any job."""
    return None if nproc is None or nproc == 1 else own_rank(nproc)


def refuse(nproc: int | None, what: str) -> None:
    """Refuse several ranks for work that runs in one process.

    Raises:
        UsageError: several ranks are requested.
    """
    if nproc is not None and nproc > 1:
        raise UsageError(
            f"--nproc {nproc}: {what} is computed by transformers in one process",
            remedy="leave --nproc out, or name the run",
        )
