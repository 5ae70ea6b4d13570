# `--stage`: which stage of a run a command is about. The stages themselves are in mmscale/train/stages/table.py, whose
# names are repeated here because its imports would cost every command's start.
"""The stage option."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Stage(StrEnum):
    """What `mmscale train` and `mmscale launch` train."""

    MAIN = "main"
    AUXILIARY = "auxiliary"


OfStage = Annotated[
    Stage,
    typer.Option("--stage", help="main: the model; auxiliary: its causal routers, after it, everything else frozen."),
]
