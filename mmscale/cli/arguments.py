"""Arguments and options that several commands take. Importing it is cheap."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", show_default=False, help="Settings that replace the file's, e.g. train.steps=100."
    ),
]
RunAtStep = Annotated[str, typer.Argument(metavar="RUN[@STEP]", help="Run folder, and optionally a step of it.")]
NewRun = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a new run.")]
Tasks = Annotated[
    int | None,
    typer.Option(
        "--tasks",
        metavar="N",
        min=1,
        show_default=False,
        help="Tasks that share the work: of a job array on --cluster, or processes of this machine.",
    ),
]
Signers = Annotated[
    Path | None,
    typer.Option("--signers", metavar="FILE", help="Allowed signers, see ssh-keygen(1); one of them must have signed."),
]
