"""Holds the lock of a run during training.

Holds a run's lease during `mmscale train`: in the parent of local ranks, or in rank 0 if another program started the
ranks or there is only one. It is taken before torch is loaded, so that `mmscale status`, `logs` and `stop` know the run
from then on. Under `mmscale launch` the job holds it, and ranks only check it. resilience/run_lock.py is the lock
itself. No torch.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from mmscale.errors import LaunchError, shell_command
from mmscale.resilience import lease, run_lock
from mmscale.resilience.lease import VARIABLE, Fence
from mmscale.runs.attempts import next_attempt
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.stages.table import STAGES, Stage

BY_TRAIN = "train-"  # prefix of the lease ids of attempts that `mmscale train` started
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


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
        lock.acquire(name, attempt=attempt)
        for other in other_stage_folders(run, stage):
            run_lock.refuse_held(other)
        if next_attempt(folder) != attempt:  # another process has trained since the number was read
            lease.renew(folder, name, attempt=next_attempt(folder))
        yield name


@dataclass
class Claim:
    """The lock of a run, as rank 0 holds it while torch is loaded and ranks are started.

    Attributes:
        lease_id: of the attempt; "": another process holds the lock, or it was refused.
        refused: cause and remedy, if another process trains the run; all ranks raise it together.
        begun: from now on `StopRequest` handles signals.
    """

    lease_id: str = ""
    refused: tuple[str, str] | None = None
    begun: bool = False


@contextlib.contextmanager
def claimed(run: Path, stage: Stage, env: RankEnv) -> Iterator[Claim]:
    """Hold the lock on rank 0, from before torch is loaded; other ranks and a launch's hold nothing.

    A stop request before training has begun ends the process at once, and releases the lock.

    Args:
        run: the main run's folder.
        stage: the stage to train.
        env: place of this rank.

    Raises:
        HeldError: this stage, or another one of the run, is being trained; if there are several ranks, it is raised
            later by all of them.
        LaunchError: a stop was requested before training began.
    """
    claim = Claim()
    if is_launched() or not env.is_first:
        yield claim
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ended_at_once(claim))
        _take(claim, stack, run, stage)
        if claim.refused is not None and env.world_size == 1:
            raise run_lock.HeldError(claim.refused[0], remedy=claim.refused[1])
        yield claim


def _take(claim: Claim, stack: contextlib.ExitStack, run: Path, stage: Stage) -> None:
    try:
        claim.lease_id = stack.enter_context(held(run, stage))
    except LaunchError as error:
        claim.refused = (error.cause, error.remedy)


class _Stopped(BaseException):
    """A stop request before training has begun.

    Not an Exception, which libraries that are being imported may catch. Not a KeyboardInterrupt either: if one passes
    through `exec` of a string (dataclasses and namedtuples use it), `python -m` ends by SIGINT whatever main returns.
    """


@contextlib.contextmanager
def _ended_at_once(claim: Claim) -> Iterator[None]:
    """End the block at a stop request, until training has begun."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set signal handlers
        return
    received: list[signal.Signals] = []

    def end(number: int, _: FrameType | None) -> None:
        if claim.begun:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # the process saves and ends already
        received.append(signal.Signals(number))
        raise _Stopped

    numbers = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    except _Stopped:
        raise LaunchError(
            f"stopped by {received[0].name} before training began: nothing was saved",
            remedy="start it again: it continues from the newest checkpoint, if there is one",
        ) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def held_by_ranks(
    run: Path, stage: Stage, env: RankEnv, *, from_first: Callable[[Any], Any], claim: Claim | None = None
) -> Iterator[Fence]:
    """The same as `held` for ranks in a process group: rank 0 holds the lease unless a launcher does.

    Every rank calls it, with handlers of stop requests installed.

    Args:
        run: the main run's folder.
        stage: the stage to train.
        env: place of this rank.
        from_first: returns rank 0's value on every rank.
        claim: of `claimed`; None: the lock is taken here.

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
        if claim is None:
            claim = Claim()
            if env.is_first:
                _take(claim, stack, run, stage)
        claim.begun = True
        name, refused = from_first((claim.lease_id, claim.refused))
        if refused is not None:
            raise run_lock.HeldError(refused[0], remedy=refused[1])
        yield Fence.of_rank(folder, env.rank, {VARIABLE: name}, local_rank=env.local_rank)
