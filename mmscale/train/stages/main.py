"""The main stage: trains the model."""

from __future__ import annotations

from typing import Any

from mmscale.config.notes import notes
from mmscale.data.loader import BatchLoader
from mmscale.plan import flops_per_token, plan
from mmscale.runtime import device
from mmscale.train.hooks import EvalHook
from mmscale.train.layers_log import LayersHook
from mmscale.train.loop import Hook
from mmscale.train.parts import build as build_parts
from mmscale.train.progress import banner
from mmscale.train.stages.built import Given, Tools
from mmscale.train.state import TrainState


class MainStage:
    """The model with its optimizer (`BuiltStage`)."""

    def __init__(self, given: Given) -> None:
        self.given = given
        parts = build_parts(given.settings, given.groups)
        self.stepper = parts.stepper
        self.state = TrainState(parts.chunks, parts.optimizer, routers=parts.routers)
        self.flops_per_token = flops_per_token(given.settings).training

    @property
    def begins_from(self) -> dict[str, Any]:
        """Nothing: the data begins."""
        return {}

    def origin(self) -> dict[str, Any]:
        """Nothing: it begins by itself."""
        return {}

    def announce(self, *, attempt: int) -> list[str]:
        """What is trained, on what; notes on its settings."""
        config = self.given.settings
        shares = config.model.experts.share
        shown = banner(
            config,
            world_size=self.given.env.world_size,
            device=device.device_name(),
            plan=plan(config),
            share=shares if isinstance(shares, dict) else None,
            attempt=attempt,
            start_step=self.state.step,
        )
        return [shown, *notes(config)]

    def hooks(self, tools: Tools, batches: BatchLoader) -> list[Hook]:
        """Figures of every layer, and the held-out split."""
        config, metrics = self.given.settings, tools.records.metrics
        layers = LayersHook(config, groups=self.given.groups, metrics=metrics)
        if tools.evaluate is None:
            tools.progress.say("there are no held-out documents: nothing is evaluated")
            return [layers]
        return [
            layers,
            EvalHook(
                config,
                evaluate=tools.evaluate,
                clock=tools.clock,
                progress=tools.progress,
                metrics=metrics,
                events=tools.records.events,
            ),
        ]

    def is_complete(self) -> bool:
        """The last save is the end."""
        return True

    def complete(self, tools: Tools) -> None:
        """Nothing is left."""
