"""Commands that check this machine and plan the layout of a run.

`mmscale doctor` and `mmscale plan`: the equipment of this machine, and the needs of a configuration. Checks live in
runtime/doctor.py, arithmetic in plan/.
"""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmscale.cli.arguments import Overrides
from mmscale.cli.output import Json, console, emit
from mmscale.errors import DataError, UsageError
from mmscale.tables.gpus import DEFAULT, GPUS

if TYPE_CHECKING:
    from mmscale.config import Config
    from mmscale.plan.sizing_inputs import Machine

_STYLE = {"ok": "green", "warn": "yellow", "missing": "red"}


def doctor(
    run_dir: Annotated[Path, typer.Option("--run-dir", metavar="DIR", help="Folder for runs.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Check versions, devices, communication, schedulers and folders, and list what to fix."""
    from mmscale.runtime import doctor as examination

    checks = examination.examine(run_dir=run_dir)
    healthy = examination.healthy(checks)
    emit({"healthy": healthy, "checks": checks}, as_json=as_json, text=lambda: _checks(checks))
    if not healthy:
        raise typer.Exit(1)


def _checks(checks: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    for check in checks:
        # A missing optional component is not a fault and is not marked as one.
        style = _STYLE[check["status"]] if check["status"] != "missing" or check["required"] else "dim"
        table.add_row(Text(check["status"], style), Text(check["name"]), Text(check["detail"]))
        if check["fix"]:
            table.add_row("", "", Text(f"fix: {check['fix']}", "bold" if style != "dim" else "dim"))
    shown = console()
    shown.print(table)
    faults = [
        check for check in checks if check["status"] == "warn" or (check["status"] == "missing" and check["required"])
    ]
    verdict = (
        "mmscale can train here" if all(check["status"] == "warn" for check in faults) else "mmscale cannot train here"
    )
    shown.print(f"\n{verdict}; {len(faults) or 'nothing'} to fix")


def plan(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", show_default=False, help="YAML file; not needed with --data.")
    ] = "",
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option("--gpus", min=1, show_default=False, help="Number of devices.")] = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option(
            "--gpu-memory",
            metavar="GiB",
            min=0.001,
            show_default=False,
            help="Memory of a device [GiB]; default: that of --gpu.",
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            metavar="NAME",
            show_default=False,
            help=f"Device to plan for: {', '.join(GPUS)}, or a FILE.json of `mmscale bench calibrate`. "
            f"Default: {DEFAULT}.",
        ),
    ] = None,
    storage: Annotated[
        float,
        typer.Option("--storage", metavar="GB/s", min=0.001, help="Bandwidth of the shared file system [GB/s]."),
    ] = 10.0,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="DIR|FILE",
            help="Propose a configuration for a prepared data set or for document files; may be repeated.",
        ),
    ] = None,
    budget: Annotated[
        str, typer.Option("--budget", metavar="TIME", help="With --data: time to train, e.g. 30m, 8h.")
    ] = "30m",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", show_default=False, help="With --data: write the configuration to this file."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compute parameters, FLOPs, memory and messages of each rank and the load on the cluster; sort layouts by time.

    With --data and without CONFIG it proposes a configuration for documents, a machine (this one, or --gpu and --gpus)
    and a time, with the rule behind each setting.
    """
    if data:
        if config or overrides:
            raise UsageError(
                "plan: CONFIG and --data are both given",
                remedy="leave CONFIG away to get a proposal, or --data to plan a configuration",
            )
        _propose(_Asked(data, budget, gpu, gpus, gpu_memory, out), as_json=as_json)
        return
    if not config:
        raise UsageError(
            "plan: neither CONFIG nor --data is given",
            remedy="name a configuration, or the documents that you want one for: --data FILE.jsonl --budget 30m",
        )
    from mmscale import plan as planning
    from mmscale.config import plugins
    from mmscale.config.load import load

    loaded = _with_measured_share(load(config, overrides or (), recorded=True))
    for cause in plugins.missing(loaded):
        typer.echo(f"note: {cause}; the plan needs no plug-in", err=True)
    result = planning.plan(loaded, gpus, gpu_memory, gpu, storage_gb_s=storage)

    def text() -> None:
        shown = console()
        typer.echo(planning.render(result, width=shown.width, color=shown.is_terminal and not shown.no_color), nl=False)

    emit(result, as_json=as_json, text=text)


def _with_measured_share(config: Config) -> Config:
    """The configuration with the measured shares of its modalities, if its data is prepared."""
    if not config.model.has_experts or config.model.experts.share != "auto" or not config.data.sources:
        return config
    from mmscale.data.prepared.share import nominal_share

    try:
        share = {name: round(value, 6) for name, value in nominal_share(config).items()}
    except DataError:  # not prepared yet; the plan mentions that it assumes equal shares
        return config
    experts = config.model.experts.model_copy(update={"share": share})
    return config.model_copy(update={"model": config.model.model_copy(update={"experts": experts})})


@dataclass(frozen=True)
class _Asked:
    """Options of `plan --data`, as given."""

    data: list[str]
    budget: str
    gpu: str | None
    gpus: int | None
    gpu_memory: float | None
    out: Path | None

    @property
    def command(self) -> list[str]:
        """The words of the command."""
        named = {
            "--gpu": self.gpu,
            "--gpus": self.gpus,
            "--gpu-memory": self.gpu_memory,
            "--out": self.out,
        }
        words = ["mmscale", "plan", *(word for one in self.data for word in ("--data", one)), "--budget", self.budget]
        return words + [str(word) for pair in named.items() if pair[1] is not None for word in pair]

    @property
    def name(self) -> str:
        """Name of the run: that of the file that is written, or of the data."""
        stem = self.out.stem if self.out is not None else Path(self.data[0]).stem
        return re.sub(r"[^A-Za-z0-9_-]", "_", stem).strip("_-")[:100] or "mine"

    def check_out(self) -> None:
        """Refuse an output file that cannot be written, before anything is read.

        Raises:
            UsageError: it exists, or its folder is a file.
        """
        if self.out is None:
            return
        if self.out.exists():
            raise UsageError(f"--out {self.out} exists", remedy="choose another name, or remove it")
        blocked = next((folder for folder in self.out.parents if folder.exists()), None)
        if blocked is not None and not blocked.is_dir():
            raise UsageError(f"--out {self.out}: {blocked} is a file", remedy="choose another folder")


def _propose(asked: _Asked, *, as_json: bool) -> None:
    from mmscale.config.load import resolve
    from mmscale.config.values import parse_seconds
    from mmscale.data.prepared.survey import survey
    from mmscale.plan import sizing
    from mmscale.plan.proposal import yaml_lines

    seconds = parse_seconds(asked.budget)
    if not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        raise UsageError(f"--budget {asked.budget!r} is not a time", remedy="write e.g. 30m, 8h or 3d")
    asked.check_out()
    machine = _machine(asked)
    facts = survey(asked.data)
    proposal = sizing.propose(facts, machine, budget_s=float(seconds), name=asked.name)
    resolve(proposal.settings)  # a proposal that `train` refuses is a bug
    lines = yaml_lines(proposal, command=asked.command)
    if asked.out is not None:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text("\n".join(lines) + "\n")
    result = proposal.as_dict() | {
        "data": asked.data,
        "documents": facts.documents,
        "images": facts.images,
        "items": {one.modality: one.number for one in facts.others},
        "rejected": facts.rejected,
        "first_rejected": facts.first_rejected,
        "machine": machine.name,
        "ranks": machine.ranks,
        "out": None if asked.out is None else str(asked.out),
    }
    emit(result, as_json=as_json, text=lambda: _proposal(result, lines, asked.out))


def _machine(asked: _Asked) -> Machine:
    """The devices that were named, otherwise this machine's CPU."""
    from mmscale.plan.measured import figures_of
    from mmscale.plan.sizing_inputs import Machine
    from mmscale.wording import numbered

    if asked.gpu is not None or asked.gpus is not None or asked.gpu_memory is not None:
        return Machine.of_gpus(figures_of(asked.gpu or DEFAULT), asked.gpus or 1, memory=asked.gpu_memory)
    from mmscale.runtime import cpu_speed

    cores = cpu_speed.cores()
    return Machine(f"this machine, {numbered(cores, 'core')}", "cpu", min(8, cores), cpu_speed.flops_of_a_core())


def _proposal(result: dict[str, Any], lines: list[str], out: Path | None) -> None:
    from rich.table import Table
    from rich.text import Text

    from mmscale.plan.render import short
    from mmscale.wording import duration, numbered

    shown = console()
    others = "".join(f", {number:,} of {name}" for name, number in result["items"].items())
    shown.print(
        f"{numbered(result['documents'], 'document')} with {numbered(result['images'], 'picture')}{others}, on "
        f"{result['machine']}: about {short(result['tokens_per_second'])} tokens/s, {duration(result['seconds'])} of "
        f"training, {result['passes']:.1f} passes over the data",
        markup=False,
    )
    if result["rejected"]:
        shown.print(
            f"note: {result['rejected']:,} of the records that were read are no documents and are left out, the first "
            f"is {result['first_rejected']}",
            markup=False,
        )
    table = Table(box=None, pad_edge=False)
    for column in ("setting", "value", "rule", "source"):
        table.add_column(column, overflow="fold")
    for rule in result["rules"]:
        table.add_row(*(Text(rule[key]) for key in ("setting", "value", "reason", "source")))
    shown.print(table)
    if out is None:
        typer.echo("\n".join(["", *lines]))
        return
    ranks = ["--nproc", str(result["ranks"])] if result["ranks"] > 1 else []
    typer.echo(f"wrote {out}")
    first = "next"
    if "prepare" in result["settings"]["data"]:
        command = ["mmscale", "data", "prepare", str(out), "--out", result["settings"]["data"]["path"]]
        typer.echo(f"next: {shlex.join(command)}")
        first = "then"
    typer.echo(f"{first}: {shlex.join(['mmscale', 'train', str(out), *ranks])}")
