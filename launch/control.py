# `mmscale stop` and `resume`: ends a launched run after a save, launches it again. What was launched, record.py knows.
"""Stopping and going on."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import owner, scheduler, submit
from launch import record as records
from mmscale.checkpoint.layout import Store
from mmscale.config.load import load
from mmscale.errors import LaunchError, UsageError
from mmscale.resilience import lease
from mmscale.train.preflight import check_changes


def stop(run: Path, *, now: bool = False) -> dict[str, Any]:
    """Have a run save and end for good; or end it at once.

    Args:
        run: its folder.
        now: without a save.

    Returns:
        run, job, and what was done.

    Raises:
        LaunchError: nothing of this run is running or waiting.
    """
    folder = _launch_folder(run)
    job = records.job_of(folder)
    if job is None:
        return _stop_here(run, folder, now=now)
    state = scheduler.job_state(job)
    if state is None or state.ended:
        said = "SLURM does not know it any more" if state is None else f"it is {state.state}"
        raise LaunchError(f"job {job} of {run} does not run: {said}", remedy=f"`mmscale resume {run}` starts it again")
    records.ask_stop(folder)  # first, so that a restart which begins now knows it
    if now or state.state == "PENDING":
        scheduler.cancel(job)
        return {"run": str(run), "job": job, "done": "cancelled" if now else "cancelled while it waited"}
    scheduler.cancel(job, signal="USR1", batch_only=True)
    return {"run": str(run), "job": job, "done": "asked to save and end"}


def _stop_here(run: Path, folder: Path, *, now: bool) -> dict[str, Any]:
    held = lease.owner(run)
    if held is None or held.host != os.uname().nodename:
        raise LaunchError(f"{run} does not run on this machine", remedy="run `mmscale stop` where it was launched")
    records.ask_stop(folder)
    with contextlib.suppress(ProcessLookupError):
        os.kill(held.pid, signal.SIGKILL if now else signal.SIGUSR1)
        return {"run": str(run), "job": "", "done": "ended" if now else "asked to save and end"}
    raise LaunchError(f"{run} does not run: process {held.pid} is gone", remedy=f"`mmscale resume {run}`")


def resume(
    run: Path,
    overrides: Sequence[str] = (),
    *,
    cluster: str | None = None,
    nodes: int | None = None,
    yes: bool = False,
) -> dict[str, Any]:
    """Launch a run again with the configuration and the profile of its last launch.

    Args:
        run: its folder.
        overrides: settings that change.
        cluster: another profile.
        nodes: another number of nodes.
        yes: go on although the objective or the data change.

    Returns:
        What `submit.launch` says, and `changed`: settings that differ from the newest checkpoint's.

    Raises:
        MmscaleError: it runs already, or a change has to be confirmed.
    """
    folder = _launch_folder(run)
    record = records.read_record(folder)
    taken = [text for text in overrides if text.partition("=")[0] in ("run.name", "run.dir")]
    if taken:
        raise UsageError(f"resume {run}: {taken[0]} would be another run", remedy="`mmscale launch` starts a new run")
    owner.refuse_busy(run)
    chosen = cluster or record.cluster
    planned = submit.plan_launch(
        record.config, overrides, cluster=chosen, nodes=nodes or (None if cluster else record.nodes), yes=yes
    )
    changed = _changed(run, planned[0], yes=yes)
    (found,) = submit.launch(planned)
    return found | {"changed": changed}


def _changed(run: Path, planned: submit.Planned, *, yes: bool) -> list[str]:
    store = Store.of_run(run)
    newest = store.newest()
    if newest is None:
        return []
    return check_changes(planned.config, store.info(newest), where=str(store.path(newest)), yes=yes)


def settings(run: Path) -> Any:
    """The configuration of the newest launch, or of the run where it was never launched."""
    folder = records.latest(run)
    return load(records.read_record(folder).config if folder is not None else run / "config.yaml")


def _launch_folder(run: Path) -> Path:
    folder = records.latest(run)
    if folder is None:
        raise LaunchError(f"{run} was never launched", remedy="start it: `mmscale launch CONFIG --cluster NAME`")
    return folder
