"""Stops and resumes runs.

`mmscale stop` and `resume`: end a run after a save, and launch it again. record.py has the records of launches.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from launch import chain, owner, scheduler, submit
from launch import record as records
from launch.job_states import Phase
from launch.job_table import JobTable
from launch.start_again import start_again
from mmscale.checkpoint.layout import Store
from mmscale.errors import LaunchError, UsageError, shell_command
from mmscale.resilience import lease, run_lock
from mmscale.train.preflight import check_changes
from mmscale.train.stages.table import STAGES


def stop(run: Path, *, now: bool = False) -> dict[str, Any]:
    """Make a run save and end for good, or end it immediately. All jobs of its chain end.

    Args:
        run: its folder, or that of its stage.
        now: end without a save.

    Returns:
        run, job (the one that trains, or would be next), done; and `jobs`: the action on each, by its number.

    Raises:
        LaunchError: no job of this run runs or waits.
    """
    records.check_folder(run)
    held = lease.owner(run)
    jobs = chain.keys(run)
    if held is not None and not held.job and (not jobs or run_lock.holder_lives(run, held) is not False):
        return _stop_process(run, held, now=now)
    if not jobs:
        raise LaunchError(f"{run} does not run", remedy=f"{shell_command('status', run)} shows how it ended")
    try:
        found = chain.links(run, JobTable())
    except scheduler.UnreachableError as error:
        return _ask_without_slurm(run, error)
    living = chain.alive(found)
    if not living:
        raise LaunchError(_none_runs(run, found[-1]), remedy=f"{shell_command('resume', run)} starts it again")
    for link in living:  # first, so that a restart that begins now finds the request
        records.ask_stop(link.folder)
    done = {}
    for link in reversed(living):  # the training job last: its end would start the next one
        done[link.key.id] = _end(link, now=now)
    first = living[0].key.id
    return {"run": str(run), "job": first, "done": done[first], "jobs": dict(reversed(done.items()))}


def _end(link: chain.Link, *, now: bool) -> str:
    phase = link.state.phase if link.state is not None else None
    if now or phase is Phase.WAITING:
        scheduler.cancel(link.key.id)
        return "cancelled" if now else "cancelled while it waited"
    if (
        phase is Phase.ENDING
    ):  # SLURM refuses signals at this stage; if the job was requeued, it finds the request at its start
        return "asked to end; SLURM is ending it already"
    scheduler.cancel(link.key.id, signal="USR1", batch_only=True)
    return "asked to save and end"


def _none_runs(run: Path, last: chain.Link) -> str:
    said = last.note or ("SLURM does not know it any more" if last.state is None else f"it is {last.state.state}")
    return f"job {last.key.id} of {run} does not run: {said}"


def _ask_without_slurm(run: Path, error: scheduler.UnreachableError) -> dict[str, Any]:
    """Only write the request into the run folder, which a running job polls and a waiting job reads at its start."""
    for folder, _ in chain.keys(run):
        records.ask_stop(folder)
    done = f"asked to save and end, through the run folder alone: {error.cause}"
    return {"run": str(run), "job": chain.keys(run)[-1][1].id, "done": done, "jobs": {}}


def _stop_process(run: Path, held: lease.Lease, *, now: bool) -> dict[str, Any]:
    """Stop a holder of the run that is not a SLURM job: `mmscale train`, or a launch on this machine."""
    result = {"run": str(run), "job": "", "jobs": {}}
    folder = records.latest(run)
    if held.by == "launch" and folder is not None and not now:
        records.ask_stop(folder)
    if run_lock.holder_lives(run, held) is None:
        where = f"process {held.process.pid} on {held.host}"
        if held.by == "launch" and folder is not None and not now:  # it polls the request once a second
            return result | {
                "done": f"asked to save and end, through the run folder alone: {where} is not seen from here"
            }
        raise LaunchError(
            f"{run} is trained by {where}, which is not seen from here",
            remedy=f"run {shell_command('stop', run)} there",
        )
    # A launch has one child, which starts the ranks and ends them with itself. A killed `mmscale train` ends its own
    # ranks.
    below = held.process.children() if now and held.by == "launch" else []
    if not held.process.send(signal.SIGKILL if now else signal.SIGUSR1):
        raise LaunchError(
            f"{run} does not run: process {held.process.pid} is gone",
            remedy=start_again(run) if folder is None else shell_command("resume", run),
        )
    for process in below:
        process.send(signal.SIGKILL)
    if now and held.by == "launch" and folder is not None:  # not before: the job would have its ranks save
        records.ask_stop(folder)
    return result | {"done": "ended" if now else "asked to save and end"}


def resume(
    run: Path,
    overrides: Sequence[str] = (),
    *,
    cluster: str | None = None,
    nodes: int | None = None,
    yes: bool = False,
    asked: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Launch a run again with the configuration and the profile of its last launch.

    Args:
        run: its folder, or that of its stage.
        overrides: changed settings.
        cluster: another profile.
        nodes: another number of nodes.
        yes: continue although the objective or the data changes.
        asked: settings of the profile that the command line replaces; without `cluster` the last launch's stay in
            effect.

    Returns:
        The result of `submit.launch`, and `changed`: settings that differ from the newest checkpoint's.

    Raises:
        MmscaleError: the run is running, or a change needs a confirmation.
    """
    folder = _launch_folder(run)
    record = records.read_record(folder)
    taken = [text for text in overrides if text.partition("=")[0] in ("run.name", "run.dir")]
    if taken:
        raise UsageError(f"resume {run}: {taken[0]} would be another run", remedy="`mmscale launch` starts a new run")
    owner.refuse_busy(run)
    chosen = cluster or record.cluster
    planned = submit.plan_launch(
        record.config,
        overrides,
        cluster=chosen,
        nodes=nodes or (None if cluster else record.nodes),
        stage=record.stage,
        yes=yes,
        asked=asked if cluster else {**record.asked, **asked},
    )
    changed = _changed(run, planned[0], yes=yes)
    (found,) = submit.launch(planned)
    return found | {"changed": changed}


def _changed(run: Path, planned: submit.Planned, *, yes: bool) -> list[str]:
    store = Store.of_run(run)
    newest = store.newest()
    if newest is None:
        return []
    stage = STAGES[planned.record.stage]
    return check_changes(
        stage.recorded(planned.config),
        store.info(newest),
        where=str(store.path(newest)),
        settings=stage.settings,
        optim=stage.optim,
        yes=yes,
    )


def _launch_folder(run: Path) -> Path:
    records.check_folder(run)
    folder = records.latest(run)
    if folder is None:
        launched = "`mmscale launch CONFIG --cluster NAME`"
        if (run / lease.LEASE).is_file():
            raise LaunchError(
                f"{run} was started by `mmscale train`, and resume starts jobs of `mmscale launch`",
                remedy=f"{start_again(run)}; or {launched}",
            )
        raise LaunchError(f"{run} was never launched", remedy=f"start it: {launched}")
    return folder
