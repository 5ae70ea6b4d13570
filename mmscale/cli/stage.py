"""Options of commands that train a stage.

Options that `mmscale train` and `mmscale launch` share: the stage of a run to train, and its start.
mmscale/train/stages/table.py defines the stages. Their names are repeated here, because importing the table would slow
down the start of every command.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class StageName(StrEnum):
    """The part of a run that `mmscale train` and `mmscale launch` train."""

    MAIN = "main"
    AUXILIARY = "auxiliary"
    SFT = "sft"


OfStage = Annotated[
    StageName,
    typer.Option(
        "--stage",
        help="main: the model; auxiliary: its causal routers, after the main run, with all other weights frozen; sft: "
        "the model on conversations, from the main run's weights, with a loss on answers only.",
    ),
]
FromScratch = Annotated[
    bool, typer.Option("--from-scratch", help="Start at step 0 although the run's checkpoints are lost.")
]
