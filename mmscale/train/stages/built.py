"""The interface between a stage and the trainer: what a stage provides, and what it receives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron.core.process_groups_config import ProcessGroupCollection

from mmscale.config import Config
from mmscale.data.stream.loader import BatchLoader
from mmscale.model.auxiliary import RouterLearning
from mmscale.runs.extents import Extent
from mmscale.runtime.rank_env import RankEnv
from mmscale.tables.routings import Routing
from mmscale.train.log.progress_lines import Progress
from mmscale.train.log.run_logs import RunLogs
from mmscale.train.loop import Hook
from mmscale.train.stage_state import StageState
from mmscale.train.steps.step import Steps
from mmscale.train.throughput import Throughput


@dataclass(frozen=True)
class StageInputs:
    """The inputs for building a stage, on every rank.

    Attributes:
        config: the configuration that the stage records, shares resolved.
        settings: the stage's, from `Stage.settings`.
        run: the run's folder.
        folder: the stage's folder.
        env: this process's place among the ranks.
        groups: process groups.
        unused: settings of the run that have no effect in this stage, by dotted key.
    """

    config: Config
    settings: Config
    run: Path
    folder: Path
    env: RankEnv
    groups: ProcessGroupCollection
    unused: tuple[str, ...] = ()


class Evaluate(Protocol):
    """Losses on held-out data; every rank calls it.

    Each batch reports progress to the watchdog and checks for a stop.
    """

    def __call__(self, routing: Routing, *, learning: RouterLearning | None = None) -> dict[str, dict[str, float]]:
        """As mmscale.train.steps.evaluation.evaluate, for each set of mmscale.data.stream.passes by its name.

        Args:
            routing: mode by which experts are assigned to tokens.
            learning: collects metrics of auxiliary routers on the first of the sets.
        """


@dataclass(frozen=True)
class StageServices:
    """The trainer's services for a stage's own hooks and for its completion.

    Attributes:
        clock: measures pauses.
        progress: the terminal.
        logs: metrics.jsonl and events.jsonl.
        evaluate: measures held-out data; None: there is none.
        beat: must be called between parts of long work, so that the watchdog does not take it for a hang.
        extents: how much of a set is evaluated, by the set's name.
        on_values: called with the step of an evaluation and its values by their keys, the same on every rank.
    """

    clock: Throughput
    progress: Progress
    logs: RunLogs
    evaluate: Evaluate | None
    beat: Callable[[], None]
    extents: Mapping[str, Extent]
    on_values: Callable[[int, Mapping[str, float]], None]


class BuiltStage(Protocol):
    """A stage on this rank, with its initial weights. Every rank calls every method."""

    @property
    def stepper(self) -> Steps:
        """Computes its steps."""

    @property
    def state(self) -> StageState:
        """The state that its checkpoints store."""

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs of a token in one of its steps [FLOP]."""

    @property
    def begins_from(self) -> dict[str, Any]:
        """Metadata of another stage's checkpoint, from whose position in the data the first step continues."""

    def origin(self) -> dict[str, Any]:
        """Metadata that only this stage's checkpoints have."""

    def announce(self, *, attempt: int) -> list[str]:
        """Lines for the terminal before the first step of an attempt."""

    def hooks(self, tools: StageServices, batches: BatchLoader) -> list[Hook]:
        """Hooks that only this stage has.

        Args:
            tools: of the trainer.
            batches: gives the batches that follow the step's.
        """

    def resumed(self, tools: StageServices) -> None:
        """Finish what the previous attempt left undone after the step from which this one resumes.

        Raises:
            CutShortError: a stop was requested during an evaluation; here and in `complete`.
        """

    def is_complete(self) -> bool:
        """Whether nothing is left to do after the last step was saved."""

    def complete(self, tools: StageServices) -> None:
        """Do the work that follows the save of the last step.

        If this attempt is killed in it, the next one calls it again.
        """
