"""Plug-in hooks (`train.hooks`): the base class with the events of a run, and the code that calls the hooks.

docs/extending/hook.md says what a hook may do in each method. The trainer's own hooks are in hooks.py.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from mmscale.config import Config
from mmscale.errors import HookError, MmscaleError
from mmscale.tables import plugins
from mmscale.tables.plugins import Use
from mmscale.train.loop import Checkpoints
from mmscale.train.stage_state import StageState
from mmscale.train.steps.step_report import StepReport

PREFIX = "hooks/"  # prefix of their metrics in metrics.jsonl


@dataclass(frozen=True)
class HookRun:
    """Information about the run that a hook receives when it is made, on every rank.

    Attributes:
        config: the settings of the stage.
        stage: "main" or the name of another stage.
        folder: of the stage, with metrics.jsonl, events.jsonl and checkpoints. Write files on rank 0 only.
        rank: of this process.
        world_size: number of ranks.
        modules: this rank's part of the model.
        say: prints a line on the terminal; does nothing on ranks other than 0.
        add_event: `add_event("name", field=value)` adds an event to events.jsonl; does nothing on ranks other than 0.
    """

    config: Config
    stage: str
    folder: Path
    rank: int
    world_size: int
    modules: Sequence[nn.Module]
    say: Callable[[str], None]
    add_event: Callable[..., None]

    @property
    def tell(self) -> Callable[..., None]:
        """The former name of `add_event`."""
        warnings.warn("HookRun.tell is deprecated; use HookRun.add_event", DeprecationWarning, stacklevel=2)
        return self.add_event


class TrainingHook:
    """Base class of hooks. Its methods, one for each event of a run, do nothing. Every rank calls every method.

    A hook must not change anything: weights, gradients, optimizer and random numbers. It may use collectives if all
    ranks use them in the same order. The time that a hook takes is part of the step's time.
    """

    def on_start(self, step: int) -> None:
        """Weights, optimizer and the position in the data are loaded.

        Args:
            step: steps done so far; 0 in a new run.
        """

    def on_step(self, state: StageState, report: StepReport) -> None:
        """An optimizer step was applied. After a rollback, step numbers repeat.

        Args:
            state: the state that checkpoints store: step, tokens and so on.
            report: batch, losses, gradient norm and learning rate of the step.
        """

    def on_evaluation(self, step: int, routing: str, losses: Mapping[str, Mapping[str, float]]) -> None:
        """Held-out data was evaluated.

        Args:
            step: steps done so far.
            routing: mode by which experts were assigned to tokens.
            losses: `loss` and `loss/<modality>` by data set; "" means the held-out documents of the training data.
        """

    def on_save(self, step: int) -> None:
        """A checkpoint of this step is about to be saved.

        An event in events.jsonl says later whether it was completed.
        """

    def on_end(self, step: int, *, finished: bool) -> None:
        """Training ends and the last checkpoint is complete. Not called when the run ends with an error.

        Args:
            step: steps done so far.
            finished: whether it was the last step; otherwise a stop was requested.
        """

    def figures(self) -> Mapping[str, float]:
        """Metrics for metrics.jsonl and all sinks, called after `on_step` of a logged step. Only rank 0's are written.

        They are written as `hooks/<key>`.
        """
        return {}


class PluginHooks(TrainingHook):
    """All hooks that a configuration names, in its order, as one hook of the trainer.

    Args:
        config: `train.hooks`.
        run: passed to each hook when it is made.

    Raises:
        PluginError: a hook cannot be made.
    """

    def __init__(self, config: Config, run: HookRun) -> None:
        uses = [Use("hook", "train.hooks", name, arguments) for name, arguments in config.train.hooks.items()]
        self.hooks: dict[str, TrainingHook] = {use.name: plugins.make(use, run) for use in uses}

    def on_start(self, step: int) -> None:
        """Call all hooks."""
        self._each("on_start", step, lambda hook: hook.on_start(step))

    def on_step(self, state: StageState, report: StepReport) -> None:
        """Call all hooks."""
        self._each("on_step", report.step, lambda hook: hook.on_step(state, report))

    def on_evaluation(self, step: int, routing: str, losses: Mapping[str, Mapping[str, float]]) -> None:
        """Call all hooks."""
        self._each("on_evaluation", step, lambda hook: hook.on_evaluation(step, routing, losses))

    def on_save(self, step: int) -> None:
        """Call all hooks."""
        self._each("on_save", step, lambda hook: hook.on_save(step))

    def on_end(self, step: int, *, finished: bool) -> None:
        """Call all hooks."""
        self._each("on_end", step, lambda hook: hook.on_end(step, finished=finished))

    def figures(self) -> dict[str, float]:
        """Metrics of all hooks, under `hooks/`."""
        found: dict[str, float] = {}
        for name, hook in self.hooks.items():
            with _named(name, "figures"):
                found |= {f"{PREFIX}{key}": _number(value) for key, value in hook.figures().items()}
        return found

    def _each(self, point: str, step: int, call: Callable[[TrainingHook], None]) -> None:
        for name, hook in self.hooks.items():
            with _named(name, f"{point}, step {step}"):
                call(hook)


class AnnouncedSaves:
    """Checkpoints that notify hooks before each save (`Checkpoints`).

    Args:
        checkpoints: saves.
        hooks: notified.
    """

    def __init__(self, checkpoints: Checkpoints, hooks: PluginHooks) -> None:
        self.checkpoints, self.hooks = checkpoints, hooks

    def due(self, step: int) -> bool:
        """As for the checkpoints."""
        return self.checkpoints.due(step)

    def save(self, state: StageState, *, last: bool = False) -> None:
        """Notify the hooks, then save."""
        self.hooks.on_save(state.step)
        self.checkpoints.save(state, last=last)


@contextlib.contextmanager
def _named(name: str, where: str) -> Iterator[None]:
    """Adds the name of the hook to an error that it raises.

    Raises:
        HookError: the hook raised, perhaps on this rank alone.
    """
    try:
        yield
    except MmscaleError as error:
        raise HookError(f"train.hooks: {name} ended the run in {where}: {error.cause}", remedy=error.remedy) from error
    except Exception as error:
        raise HookError(
            f"train.hooks: {name} failed in {where}: {type(error).__name__}: {error}",
            remedy="correct the hook, or take it out of train.hooks; the run resumes from its last checkpoint",
        ) from error


def _number(value: float) -> float:
    number = float(value)
    return number if math.isfinite(number) else math.nan
