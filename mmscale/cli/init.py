"""The command that writes a first configuration.

`mmscale init`: prints what mmscale/presets wrote.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmscale.cli.output import Json, emit
from mmscale.presets import PRESETS


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New folder, or an existing one without these files.")],
    preset: Annotated[
        str, typer.Option("--preset", help="; ".join(f"{name}: {about}" for name, about in PRESETS.items()) + ".")
    ] = "quickstart",
    as_json: Json = False,
) -> None:
    """Write a commented configuration and a README with the commands to run."""
    from mmscale import presets

    files = presets.copy(preset, folder)
    emit({"preset": preset, "files": [str(file) for file in files]}, as_json=as_json, text=lambda: _written(files))


def _written(files: list[Path]) -> None:
    for file in files:
        typer.echo(f"wrote {file}")
    readme = next(file for file in files if file.name == "README.md")
    typer.echo(f"next: cd {readme.parent} and run the commands of {readme.name}")
