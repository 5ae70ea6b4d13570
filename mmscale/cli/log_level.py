"""How many messages commands print on stderr.

The option `--log-level` of the command line. output.py prints results and errors, which are not log messages.
"""

from __future__ import annotations

import logging
import os
from enum import StrEnum
from typing import Annotated

import typer

VARIABLE = "MMSCALE_LOG_LEVEL"
_PACKAGES = ("mmscale", "launch", "slurm", "checkpoints_tools")


class LogLevel(StrEnum):
    """The least severe messages that are printed."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


Level = Annotated[
    LogLevel | None,
    typer.Option(
        "--log-level",
        envvar=VARIABLE,
        show_default="warning",
        help="Print messages of this level and above on stderr, also in the ranks of a run or job that it starts.",
    ),
]


def apply(level: LogLevel) -> None:
    """Print messages of mmscale's own packages from this level on, with their level and module, here and in ranks."""
    os.environ[VARIABLE] = level
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    for name in _PACKAGES:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False
