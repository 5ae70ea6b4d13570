"""How saves are made, what is kept of them, and what is stored beside the tensors. Plain values; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SaveSettings:
    """How saves are made.

    Attributes:
        asynchronous: training goes on while files are written; otherwise the trainer writes them itself.
        deadline_s: seconds after which an asynchronous save is given up.
        max_failures: failed saves in a row that end the attempt.
        writers: ranks of each node that write, for the others too; 0: all of them, each its own files.
    """

    asynchronous: bool = False
    deadline_s: float = 900.0
    max_failures: int = 3
    writers: int = 0


@dataclass(frozen=True)
class Retention:
    """What is kept.

    Attributes:
        keep: newest checkpoints.
        keep_every: checkpoints of every n-th step are kept for ever; 0: none.
    """

    keep: int
    keep_every: int = 0


@dataclass(frozen=True)
class Provenance:
    """What is stored beside the tensors.

    Attributes:
        attempt: of the run.
        info: plain JSON; `config_digest` goes into the manifest too.
        code_version: goes into the manifest.
    """

    attempt: int
    info: dict[str, Any]
    code_version: str = ""
