"""Holds the lock of a run during training.

Holds a run's lease during `mmscale train`: in the parent of local ranks, or in rank 0 if another program started the
ranks. Under `mmscale launch` the job holds it, and ranks only check it. resilience/run_lock.py is the lock itself. No
torch.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mmscale.errors import LaunchError, shell_command
from mmscale.resilience import lease, run_lock
from mmscale.resilience.lease import VARIABLE, Fence
from mmscale.runs.attempts import next_attempt
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.stages.table import STAGES, Stage

BY_TRAIN = "train-"  # prefix of the lease ids of attempts that `mmscale train` started


def is_launched() -> bool:
    """Whether the job of a launch, or the parent of these ranks, holds the lease of the run."""
    return bool(os.environ.get(VARIABLE))


def is_held_by_train(lease_id: str | None) -> bool:
    """Whether `mmscale train` itself holds the lease of an attempt, at a terminal or in a user's own job."""
    return bool(lease_id) and str(lease_id).startswith(BY_TRAIN)


def stop_hint(lease_id: str | None, run: Path) -> str:
    """How to stop, in one line, for users of `mmscale train`; "" under a launch, whose job has printed it already."""
    ended = f"Ctrl-C saves a checkpoint and ends it; so does {shell_command('stop', run)} elsewhere"
    return ended if is_held_by_train(lease_id) else ""


def other_stage_folders(run: Path, stage: Stage) -> list[Path]:
    """Folders of the other stages of a run. Stages use each other's checkpoints, so only one of them trains at a time.

    Args:
        run: the main run's folder.
        stage: the stage that is left out.
    """
    return [folder for other in STAGES.values() if other is not stage and (folder := other.folder(run)).is_dir()]


def refuse_held(run: Path, stage: Stage) -> None:
    """Raise the errors of `held`, before anything is imported or written.

    Args:
        run: the main run's folder.
        stage: the stage to train.

    Raises:
        HeldError: this stage, or another one of the run, is being trained.
    """
    if is_launched():
        return
    for folder in (stage.folder(run), *other_stage_folders(run, stage)):
        run_lock.refuse_held(folder)


@contextlib.contextmanager
def held(run: Path, stage: Stage) -> Iterator[str]:
    """Hold the lease of a stage; yields the id of the attempt, which ranks get as MMSCALE_ATTEMPT_ID.

    Args:
        run: the main run's folder.
        stage: the stage to train.

    Raises:
        HeldError: this stage, or another one of the run, is being trained.
    """
    folder = stage.folder(run)
    with run_lock.RunLock(folder, by="train") as lock:
        attempt = next_attempt(folder)
        name = f"{BY_TRAIN}{secrets.token_hex(6)}"
        lock.take(name, attempt=attempt)
        for other in other_stage_folders(run, stage):
            run_lock.refuse_held(other)
        if next_attempt(folder) != attempt:  # another process has trained since the number was read
            lease.renew(folder, name, attempt=next_attempt(folder))
        yield name


@contextlib.contextmanager
def held_by_ranks(run: Path, stage: Stage, env: RankEnv, *, from_first: Callable[[Any], Any]) -> Iterator[Fence]:
    """The same as `held` for ranks in a process group: rank 0 holds the lease unless a launcher does.

    Every rank calls it.

    Args:
        run: the main run's folder.
        stage: the stage to train.
        env: place of this rank.
        from_first: returns rank 0's value on every rank.

    Raises:
        HeldError: the same on every rank.
    """
    folder = stage.folder(run)
    if is_launched():
        fence = Fence.of_rank(folder, env.rank, local_rank=env.local_rank)
        if env.is_first:
            lease.join(folder, os.environ[VARIABLE])
        try:
            yield fence
        finally:
            if env.is_first and fence.is_orphaned():  # no other process would release it
                lease.release(folder, os.environ[VARIABLE])
        return
    with contextlib.ExitStack() as stack:
        name, refused = "", None
        if env.is_first:
            try:
                name = stack.enter_context(held(run, stage))
            except LaunchError as error:
                refused = (error.cause, error.remedy)
        name, refused = from_first((name, refused))
        if refused is not None:
            raise run_lock.HeldError(refused[0], remedy=refused[1])
        yield Fence.of_rank(folder, env.rank, {VARIABLE: name}, local_rank=env.local_rank)
