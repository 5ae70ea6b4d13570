"""Commands that launch, monitor and stop jobs.

`mmscale launch`, `status`, `logs`, `stop`, `resume`: jobs on a cluster. They parse and print; launch/ does the work.
torch is not imported, because login nodes do not have it.
"""

from __future__ import annotations

import functools
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmscale.cli.arguments import ConfigFile, Overrides
from mmscale.cli.output import Json, console, emit, pairs
from mmscale.cli.stage import FromScratch, OfStage, StageName

if TYPE_CHECKING:
    from launch.job_table import JobTable

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder; RUN/auxiliary: its auxiliary stage.")]
Yes = Annotated[
    bool, typer.Option("--yes", help="Continue even if the objective or the data changed since the checkpoint.")
]
_LIKEWISE = "default: that of the profile, for `resume` that of the last launch."
Time = Annotated[
    str | None, typer.Option("--time", metavar="LIMIT", show_default=False, help=f"Time limit; {_LIKEWISE}")
]
Partition = Annotated[
    str | None, typer.Option("--partition", metavar="NAME", show_default=False, help=f"Partition of SLURM; {_LIKEWISE}")
]
Account = Annotated[
    str | None, typer.Option("--account", metavar="NAME", show_default=False, help=f"Account of SLURM; {_LIKEWISE}")
]
Qos = Annotated[
    str | None,
    typer.Option("--qos", metavar="NAME", show_default=False, help=f"Quality of service of SLURM; {_LIKEWISE}"),
]


def _asked(**settings: str | None) -> dict[str, str]:
    """Settings of the profile that the command line overrides."""
    return {name: value for name, value in settings.items() if value is not None}


def launch(
    config: ConfigFile,
    overrides: Overrides = None,
    cluster: Annotated[
        str,
        typer.Option(
            "--cluster",
            metavar="NAME",
            help="Cluster profile: NAME or path of configs/cluster/NAME.yaml; local or debug: run on this machine.",
        ),
    ] = "local",
    nodes: Annotated[
        int | None, typer.Option("--nodes", min=1, show_default=False, help="Nodes; default: the profile's.")
    ] = None,
    time: Time = None,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the batch script without submitting or writing anything.")
    ] = False,
    after: Annotated[
        str | None,
        typer.Option(
            "--after",
            metavar="JOB|RUN",
            show_default=False,
            help="Start when that job, or the job of that run, has ended.",
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep",
            metavar="KEY=A,B,...",
            show_default=False,
            help="Submit a job array over these values; may be repeated.",
        ),
    ] = None,
    at_once: Annotated[
        int | None,
        typer.Option(
            "--at-once",
            min=1,
            metavar="N",
            show_default=False,
            help="Largest number of runs of a sweep that train at the same time.",
        ),
    ] = None,
    stage: OfStage = StageName.MAIN,
    yes: Yes = False,
    from_scratch: FromScratch = False,
    as_json: Json = False,
) -> None:
    """Submit a run to SLURM. It continues automatically after preemptions, time limits, crashes and lost nodes."""
    from launch import submit

    planned = submit.plan_launch(
        config,
        overrides or (),
        cluster=cluster,
        nodes=nodes,
        sweep=sweep or (),
        stage=stage,
        after=after is not None,
        yes=yes,
        asked=_asked(time=time, partition=partition, account=account, qos=qos),
        from_scratch=from_scratch,
    )
    if dry_run:
        text = submit.script(planned, after=after, at_once=at_once)
        for said in filter(None, (one.done for one in planned)):
            typer.echo(f"note: {said}", err=True)
        emit({"script": text}, as_json=as_json, text=lambda: typer.echo(text, nl=not text.endswith("\n")))
        return
    if cluster == "local" and not all(one.done for one in planned):
        typer.echo("this run trains on this machine; --cluster NAME submits it to SLURM", err=True)
    found = submit.launch(planned, after=after, at_once=at_once)
    emit(found, as_json=as_json, text=lambda: _launched(found))
    status = max((one.get("exit_status", 0) for one in found), default=0)
    if status:
        raise typer.Exit(status)


def _launched(found: list[dict[str, Any]]) -> None:
    for one in found:
        if "done" in one:
            typer.echo(one["done"], err=True)
        if one["job"]:
            behind = [("then", " ".join(one["successors"]))] if one["successors"] else []
            pairs([("job", one["job"]), *behind, ("run", one["run"]), ("launch", one["launch"])])
    if any(one["job"] for one in found):
        console().print(f"monitor it: mmscale status {shlex.join(one['run'] for one in found)}", markup=False)


def stop(
    run: Run,
    now: Annotated[bool, typer.Option("--now", help="End the run immediately, without a save.")] = False,
    as_json: Json = False,
) -> None:
    """Ask a run to save a checkpoint and exit, with all jobs of its chain.

    Continue a launched run with `mmscale resume`, another one with the same `mmscale train`.
    """
    from launch import control

    result = control.stop(run, now=now)
    lines = [(name, result[name]) for name in ("run", "job", "done") if result[name]]  # outside SLURM there is no job
    later = [(f"job {number}", done) for number, done in result["jobs"].items() if number != result["job"]]
    emit(result, as_json=as_json, text=lambda: pairs([*lines, *later]))


def resume(
    run: Run,
    overrides: Overrides = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster", metavar="NAME", show_default=False, help="Cluster profile; default: that of the last launch."
        ),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option("--nodes", min=1, show_default=False, help="Default: the nodes of the last launch.")
    ] = None,
    time: Time = None,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Launch a run again from its newest checkpoint, with its own configuration."""
    from launch import control

    asked = _asked(time=time, partition=partition, account=account, qos=qos)
    result = control.resume(run, overrides or (), cluster=cluster, nodes=nodes, yes=yes, asked=asked)
    emit(result, as_json=as_json, text=lambda: _resumed(result))
    if result.get("exit_status"):
        raise typer.Exit(result["exit_status"])


def _resumed(result: dict[str, Any]) -> None:
    for line in result["changed"]:
        console().print(f"changed since the checkpoint: {line}", markup=False)
    _launched([result])


def logs(
    run: Run,
    rank: Annotated[int, typer.Option("--rank", min=0, help="Rank whose output is printed.")] = 0,
    attempt: Annotated[
        int | None,
        typer.Option("--attempt", min=1, show_default=False, help="Attempt of the run; default: the newest."),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing until the run ends.")] = False,
    job: Annotated[bool, typer.Option("--job", help="Print the job's own log instead of a rank's.")] = False,
    as_json: Json = False,
) -> None:
    """Print the output of a rank."""
    from launch import logs as printing

    pieces = printing.lines(run, rank=rank, attempt=attempt, follow=follow, job=job)
    if as_json:
        emit({"run": str(run), "text": "".join(pieces)}, as_json=True, text=lambda: None)
        return
    printed = False
    for text in pieces:
        typer.echo(text, nl=False)
        printed = True
    if not printed:
        whose = "the job" if job else f"rank {rank}"
        where = ": rank 0 prints the progress of all ranks" if rank and not job else ""
        typer.echo(f"note: {whose} has printed nothing{where}", err=True)
    if attempt is None and not job and not follow and (said := printing.note(run, rank=rank)):
        typer.echo(f"note: {said}", err=True)


def status(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN...", show_default=False, help="Run folders; default: all in runs/."),
    ] = None,
    watch: Annotated[
        float | None,
        typer.Option(
            "--watch", metavar="SECONDS", min=0.5, show_default=False, help="Refresh after this many seconds."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the state of runs: SLURM's state, progress, losses, checkpoints, restarts, goodput.

    Folders of data sets that jobs prepare or deduplicate are shown with the pieces that are done.
    """
    from launch import status as states
    from launch.job_table import JobTable

    table = JobTable()  # SLURM's answers are cached for half a minute, however often the table is printed
    while True:
        found = _states(runs or states.known(Path("runs")), table)
        emit(found, as_json=as_json, text=functools.partial(_show, found, clear=watch is not None))
        if watch is None or all(one["ended"] for one in found):
            return
        time.sleep(watch)


def _states(folders: list[Path], table: JobTable) -> list[dict[str, Any]]:
    """One object per folder, in their order, of runs and of data sets that jobs prepare or deduplicate."""
    from launch import status as states
    from mmscale.cli.set_status import state_of

    sets = {folder: one for folder in folders if (one := state_of(folder, table)) is not None}
    runs = iter(states.status([folder for folder in folders if folder not in sets], table))
    return [sets[folder] if folder in sets else next(runs) for folder in folders]


def _show(found: list[dict[str, Any]], *, clear: bool) -> None:
    shown = console()
    if clear and shown.is_terminal:
        shown.clear()
    from mmscale.cli import set_status

    sets = [one for one in found if one.get("kind") == set_status.DATA_SET]
    for one in sets:
        pairs(set_status.shown(one))
    runs = [one for one in found if one not in sets]
    if runs or not found:
        _table(runs)


def _table(found: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    from mmscale.runs.display_names import TIME_PARTS
    from mmscale.train.log.progress_lines import count
    from mmscale.wording import duration

    table = Table(box=None, pad_edge=False)
    columns = (
        "run",
        "state",
        "attempt",
        "nodes",
        "step",
        "left",
        "tokens/s",
        "slowest",
        "loss",
        "checkpoint",
        "restarts",
    )
    for name in (*columns, "goodput"):
        table.add_column(name, overflow="fold")
    for one in found:
        losses = " ".join(f"{name} {value:.3f}" for name, value in one["loss"].items())
        if losses and one["loss_step"] not in (None, one["step"]):  # steps after it were not logged
            losses += f" (step {one['loss_step']})"
        saved = one["last_checkpoint"]
        age = one["last_checkpoint_age_s"]
        slow = one["slowest_rank"]
        cells = (
            one["run"],
            one["state"]
            + (f" ({one['reason']})" if one["reason"] else "")
            + (f" job {one['job']}" if one["job"] else "")
            + "".join(f", then {later['job']} {later['state']}" for later in one["chain"][1:]),
            str(one["attempt"] or "-"),
            one["nodes"] or "-",
            f"{one['step']}/{one['steps'] or '?'}",
            "-" if one["eta_s"] is None else duration(one["eta_s"]),
            "-" if one["tokens_per_second"] is None else count(one["tokens_per_second"]),
            "-" if slow is None else f"rank {slow['rank']} +{slow['over_median']:.0%}",
            losses or "-",
            "-"
            if saved is None
            else f"{saved}" + (f", {duration(age)} ago" if age is not None else "") + _mirrored(one["mirror"]),
            str(one["restarts"]),
            "-" if one["goodput"] is None else f"{one['goodput']:.0%}",
        )
        table.add_row(*(Text(cell) for cell in cells))
    shown = console()
    shown.print(table)
    for one in found:
        if one["time"]:
            parts = ", ".join(f"{TIME_PARTS[name]} {duration(value)}" for name, value in one["time"].items())
            shown.print(f"{one['run']}: {parts}", markup=False)


def _mirrored(mirror: dict[str, Any] | None) -> str:
    if mirror is None:
        return ""
    step = "nothing" if mirror["step"] is None else mirror["step"]
    return f", {step} in the mirror" + (f" ({mirror['problem']})" if mirror["problem"] else "")
