# Options that `mmscale train` and `mmscale launch` share: which stage of a run they are about, and where it starts.
# The stages themselves are in mmscale/train/stages/table.py, whose names are repeated here because its imports would
# cost every command's start.
"""Options about stages."""

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
FromScratch = Annotated[
    bool, typer.Option("--from-scratch", help="Start at step 0 although the run's checkpoints are lost.")
]
