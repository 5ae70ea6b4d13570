# `mmscale doctor` and `mmscale plan`: what this machine has, and what a configuration needs.
# Checks live in runtime/doctor.py, arithmetic in plan/.
"""Commands about machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mmscale.cli.output import Json, Overrides, console, emit

_STYLE = {"ok": "green", "warn": "yellow", "missing": "red"}


def doctor(
    run_dir: Annotated[Path, typer.Option("--run-dir", metavar="DIR", help="Folder that is to hold runs.")] = Path(
        "runs"
    ),
    as_json: Json = False,
) -> None:
    """Check versions, devices, communication, schedulers and folders, and say what to fix."""
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
        # What is optional and absent is no fault, so it does not look like one.
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
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file.")],
    overrides: Overrides = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=1, show_default=False, help="Devices to spread over.")
    ] = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option("--gpu-memory", metavar="GiB", min=0.001, show_default=False, help="Memory of a device [GiB]."),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu", metavar="NAME", show_default=False, help="h100 (the default for times), h200 or a100: its figures."
        ),
    ] = None,
    storage: Annotated[
        float,
        typer.Option("--storage", metavar="GB/s", min=0.001, help="Bandwidth of the shared file system [GB/s]."),
    ] = 10.0,
    as_json: Json = False,
) -> None:
    """Compute parameters, FLOPs, memory and messages per rank, load of the cluster; order layouts by time."""
    from mmscale import plan as planning
    from mmscale.config.load import load

    result = planning.plan(load(config, overrides or ()), gpus, gpu_memory, gpu, storage_gb_s=storage)

    def text() -> None:
        shown = console()
        typer.echo(planning.render(result, width=shown.width, color=shown.is_terminal), nl=False)

    emit(result, as_json=as_json, text=text)
