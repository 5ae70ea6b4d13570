"""Evaluation of held-out sets and tasks during an attempt; a stop request can interrupt it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron.core.process_groups_config import ProcessGroupCollection

from mmscale.config import Config
from mmscale.data.prepared.tasks import TaskItem
from mmscale.data.stream.mixture import Mixture
from mmscale.data.stream.passes import SOURCES
from mmscale.model.auxiliary import RouterLearning
from mmscale.resilience.signals import StopRequest
from mmscale.runs.events import read_events
from mmscale.runs.extents import Extent, extents_before, other_parts
from mmscale.runs.held_out import ACCURACY
from mmscale.runtime import device
from mmscale.runtime.groups import from_first
from mmscale.tables.routings import Routing
from mmscale.train.stage_state import StageState
from mmscale.train.steps.answers import answers
from mmscale.train.steps.evaluation import CutShortError, evaluate_passes, extent_of
from mmscale.train.steps.step import Steps
from mmscale.train.steps.task_scores import score


class HeldOutEvaluation:
    """Evaluates all held-out sets and all tasks under one routing mode; every rank calls it.

    Args:
        config: of the stage.
        state: has the step.
        stepper: computes.
        passes: one pass over each set, by its name.
        tasks: questions by name; their accuracies are reported with the metrics of the first set.
        groups: process groups.
        beat: reports progress to the hang watchdog before each batch.
        at: called with the place "eval" and the step, for fault injection.
        stop: stop requests.
        on_evaluation: called with the step, the routing mode, and the metrics of each set.
    """

    def __init__(
        self,
        config: Config,
        *,
        state: StageState,
        stepper: Steps,
        passes: Mapping[str, Mixture],
        tasks: Mapping[str, Sequence[TaskItem]],
        groups: ProcessGroupCollection,
        beat: Callable[[], None],
        at: Callable[[str, int], None],
        stop: StopRequest,
        on_evaluation: Callable[[int, Routing, dict[str, dict[str, float]]], None],
    ) -> None:
        self.config = config
        self.state = state
        self.stepper = stepper
        self.passes = passes
        self.tasks = tasks
        self.groups = groups
        self.beat = beat
        self.at = at
        self.stop = stop
        self.on_evaluation = on_evaluation

    def __call__(self, routing: Routing, *, learning: RouterLearning | None = None) -> dict[str, dict[str, float]]:
        """Metrics of each set by its name.

        Args:
            routing: mode by which experts are assigned to tokens.
            learning: collects metrics of auxiliary routers on the first set.

        Raises:
            CutShortError: a stop was requested; raised on every rank.
        """
        self._in_order_of_run()
        found = evaluate_passes(
            self.config,
            stepper=self.stepper,
            passes=self.passes,
            groups=self.groups,
            routing=routing,
            learning=learning,
            on_batch=self._on_batch,
        )
        if self.tasks:
            found.setdefault(SOURCES, {}).update(self._accuracies(routing))
        self.on_evaluation(self.state.step, routing, found)
        return found

    def extents(self) -> dict[str, Extent]:
        """How much of each set is read, by its name."""
        batches = self.config.train.eval_batches
        return {name: extent_of(self.config, data, batches=batches) for name, data in self.passes.items()}

    def _in_order_of_run(self) -> None:
        """Read large sets in the order with which the run began, like its training data."""
        if self.state.stream:
            order = self.state.stream[0].get("order", "epochs")
            self.passes = {
                name: data if data.order == order else data.like(order=order) for name, data in self.passes.items()
            }

    def _accuracies(self, routing: Routing) -> dict[str, float]:
        ask = functools.partial(
            answers,
            config=self.config,
            stepper=self.stepper,
            groups=self.groups,
            routing=routing,
            on_batch=self._on_batch,
        )
        return {f"{ACCURACY}{name}": score(items, answers=ask).accuracy for name, items in self.tasks.items()}

    def _on_batch(self) -> None:
        self.beat()
        self.at("eval", self.state.step)
        if self.stop.agreed(device.taken()):
            raise CutShortError


def other_batches(folder: Path, extents: Mapping[str, Extent], step: int, *, first: bool) -> set[str] | None:
    """Names of the sets of which other batches are read than in the attempt before; None: unknown. Every rank calls it.

    Args:
        folder: of the stage.
        extents: of this attempt.
        step: of the checkpoint from which it resumes.
        first: whether this is rank 0, which reads the events.
    """
    found = other_parts(extents_before(read_events(folder), step), extents) if first else None
    return from_first(found)  # type: ignore[no-any-return]
