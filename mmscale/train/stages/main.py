"""The main stage: trains the model."""

from __future__ import annotations

from typing import Any

from mmscale.checkpoint.layout import Store
from mmscale.config import Config
from mmscale.config.notes import notes
from mmscale.data.prepared.share import share_of_data
from mmscale.data.stream.loader import BatchLoader
from mmscale.plan import flops_per_token, plan
from mmscale.runs.metrics import evaluation_cut_short
from mmscale.runtime import device
from mmscale.runtime.groups import from_first
from mmscale.train.assembly import build as build_parts
from mmscale.train.hooks import EvalHook
from mmscale.train.learned_data import carried
from mmscale.train.log.layers_log import LayersHook
from mmscale.train.log.progress_lines import banner, source_shares
from mmscale.train.loop import Hook
from mmscale.train.preflight import newest_intact
from mmscale.train.stages.built import StageInputs, StageServices


class MainStage:
    """The model with its optimizer (`BuiltStage`)."""

    def __init__(self, given: StageInputs) -> None:
        self.given = given
        parts = build_parts(given.settings, given.groups)
        self.stepper = parts.stepper
        self.state = parts.state
        self.flops_per_token = flops_per_token(given.settings).training
        # A stage's folder may be trained further, too.
        saved = newest_intact(Store.of_run(given.folder))[1] if given.env.is_first else {}
        self._learned: dict[str, Any] = from_first(carried(saved))

    @property
    def begins_from(self) -> dict[str, Any]:
        """Empty: the main stage starts at the beginning of the data."""
        return {}

    def origin(self) -> dict[str, Any]:
        """What the weights were trained on before, if the run began with such of other runs; otherwise empty."""
        return self._learned

    def announce(self, *, attempt: int) -> list[str]:
        """Lines about the model, the data, and notes on the settings."""
        config = self.given.settings
        capacities = config.model.experts.share
        shown = banner(
            config,
            world_size=self.given.env.world_size,
            device=device.device_name(),
            plan=plan(config),
            share=share_of_data(config) if isinstance(capacities, dict) and self.given.env.is_first else None,
            capacities=capacities if isinstance(capacities, dict) else None,
            sources=source_shares(config),
            attempt=attempt,
            start_step=self.state.step,
            folder=self.given.folder,
        )
        return [shown, *notes(config)]

    def hooks(self, tools: StageServices, batches: BatchLoader) -> list[Hook]:
        """Metrics of every layer, and evaluation of held-out data."""
        config, metrics = self.given.settings, tools.logs.metrics
        layers = LayersHook(config, groups=self.given.groups, metrics=metrics)
        evaluation = _evaluation(config, tools)
        if evaluation is None:
            tools.progress.say("there are no held-out documents: nothing is evaluated")
        return [layers, evaluation] if evaluation is not None else [layers]

    def resumed(self, tools: StageServices) -> None:
        """Evaluate after the step from which this attempt resumes, if a stop request interrupted that."""
        evaluation = _evaluation(self.given.settings, tools)
        if evaluation is not None and not self.is_complete():
            evaluation.measure(self.state.step)

    def is_complete(self) -> bool:
        """Whether no evaluation was interrupted by a stop request."""
        first, folder, step = self.given.env.is_first, self.given.folder, self.state.step
        return not from_first(evaluation_cut_short(folder, step) if first else None)

    def complete(self, tools: StageServices) -> None:
        """As `resumed`, after the last step."""
        self.resumed(tools)


def _evaluation(config: Config, tools: StageServices) -> EvalHook | None:
    """The hook that evaluates held-out data; None if there is none."""
    if tools.evaluate is None:
        return None
    return EvalHook(
        config,
        evaluate=tools.evaluate,
        clock=tools.clock,
        progress=tools.progress,
        metrics=tools.logs.metrics,
        on_event=tools.logs.add_event,
        on_values=tools.on_values,
        extents=tools.extents,
    )
