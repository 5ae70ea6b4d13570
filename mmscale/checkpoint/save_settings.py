"""Settings of saves, retention, and provenance. Plain values; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SaveSettings:
    """Settings of saves.

    Attributes:
        asynchronous: training continues while files are written; otherwise the trainer writes them itself.
        deadline_s: seconds after which an asynchronous save is abandoned.
        max_failures: failed saves in a row that end the attempt.
        writers: number of ranks of each node that write, also for the other ranks; 0: every rank writes its own files.
    """

    asynchronous: bool = False
    deadline_s: float = 900.0
    max_failures: int = 3
    writers: int = 0


@dataclass(frozen=True)
class Retention:
    """Checkpoints to keep.

    Attributes:
        keep: number of newest checkpoints.
        keep_every: checkpoints of every n-th step are kept permanently; 0: none.
        early: checkpoints of steps 1, 2, 4, ... up to this one are kept permanently; 0: none.
    """

    keep: int
    keep_every: int = 0
    early: int = 0

    def is_early(self, step: int) -> bool:
        """Whether a step is a power of two that is saved and kept."""
        return 0 < step <= self.early and step & (step - 1) == 0

    def keeps(self, step: int) -> bool:
        """Whether the checkpoint of a step is kept permanently."""
        return self.is_early(step) or (self.keep_every > 0 and step % self.keep_every == 0)


@dataclass(frozen=True)
class BestCheckpoint:
    """The best checkpoint of a run so far; stored in INFO of every checkpoint.

    Attributes:
        metric: the metric that is compared.
        step: of the checkpoint.
        value: of the metric.
    """

    metric: str
    step: int
    value: float


@dataclass(frozen=True)
class Provenance:
    """Metadata stored next to the tensors.

    Attributes:
        attempt: of the run.
        info: plain JSON; `config_digest` goes into the manifest too.
        code_version: for the manifest.
    """

    attempt: int
    info: dict[str, Any]
    code_version: str = ""
