"""What a stage brings to the trainer, and what it gets from it. run.py knows no more of a stage than this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron.core.process_groups_config import ProcessGroupCollection

from mmscale.config import Config
from mmscale.data.loader import BatchLoader
from mmscale.model.auxiliary import RouterLearning
from mmscale.model.mixed_modal import Routing
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.loop import Hook
from mmscale.train.progress import Progress
from mmscale.train.records import Records
from mmscale.train.state import StageState
from mmscale.train.step import Steps
from mmscale.train.throughput import Throughput


@dataclass(frozen=True)
class Given:
    """From what a stage is built, on every rank.

    Attributes:
        config: the run's configuration, shares resolved.
        settings: the stage's: what `Stage.settings` made of it.
        run: the run's folder.
        folder: the stage's folder.
        env: this process's place among the ranks.
        groups: process groups.
    """

    config: Config
    settings: Config
    run: Path
    folder: Path
    env: RankEnv
    groups: ProcessGroupCollection


class Evaluate(Protocol):
    """Losses on held-out data; every rank calls it. The hang watch sees each batch, and a stop is heard there."""

    def __call__(self, routing: Routing, *, learning: RouterLearning | None = None) -> dict[str, dict[str, float]]:
        """As mmscale.train.evaluate.evaluate, for each set of mmscale.data.passes by its name.

        Args:
            routing: who decides which experts take a token.
            learning: collects figures of auxiliary routers on the first of the sets.
        """


@dataclass(frozen=True)
class Tools:
    """What the trainer lends to a stage's own hooks and to its end.

    Attributes:
        clock: measures pauses.
        progress: the terminal.
        records: metrics.jsonl and events.jsonl.
        evaluate: measures held-out data; None: there is none.
        beat: called between pieces of work that take long, so that they are no hang.
    """

    clock: Throughput
    progress: Progress
    records: Records
    evaluate: Evaluate | None
    beat: Callable[[], None]


class BuiltStage(Protocol):
    """A stage on this rank, with the weights that it begins with. Every rank calls every method."""

    @property
    def stepper(self) -> Steps:
        """What it computes."""

    @property
    def state(self) -> StageState:
        """What its checkpoints keep."""

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs of a token in one of its steps [FLOP]."""

    @property
    def begins_from(self) -> dict[str, Any]:
        """What the checkpoint of another stage says of itself whose place in the data the first step goes on from."""

    def origin(self) -> dict[str, Any]:
        """What its checkpoints say of themselves beside what all do."""

    def announce(self, *, attempt: int) -> list[str]:
        """Lines for the terminal before the first step of an attempt."""

    def hooks(self, tools: Tools, batches: BatchLoader) -> list[Hook]:
        """What happens after a step in this stage alone.

        Args:
            tools: of the trainer.
            batches: gives the batches that follow the step's.
        """

    def resumed(self, tools: Tools) -> None:
        """What the attempt before has left undone after the step that this one goes on from.

        Raises:
            CutShortError: ranks were asked to stop within an evaluation; here and in `complete`.
        """

    def is_complete(self) -> bool:
        """Whether nothing is left to do after the last step's save."""

    def complete(self, tools: Tools) -> None:
        """What is left to do: the last step is saved. Called again by the next attempt if this one is killed in it."""
