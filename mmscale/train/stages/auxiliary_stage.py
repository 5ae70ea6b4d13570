"""The auxiliary stage: trains the causal routers of a run that has a main checkpoint; all other weights are frozen.

Its folder is RUN/auxiliary: checkpoints of routers, thresholds and their optimizer (the main weights stay in the main
checkpoint), logs like a run's, and report.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from megatron.core.transformer.module import Float16Module

from mmscale import bounded
from mmscale.checkpoint import integrity, sharded
from mmscale.checkpoint.layout import Store
from mmscale.checkpoint.manager import CheckpointManager
from mmscale.config.derived import tokens_per_step
from mmscale.data.prepared.identity import identities, known, same_documents
from mmscale.data.prepared.manifest import read_blend
from mmscale.data.stream.loader import BatchLoader
from mmscale.data.stream.passes import SOURCES
from mmscale.data.vocab import Vocabulary
from mmscale.errors import CheckpointError, shell_command
from mmscale.model.auxiliary import RouterLearning
from mmscale.model.build import build_chunks, transformer_config
from mmscale.plan import flops_per_token
from mmscale.runs.held_out import HeldOut
from mmscale.runs.silent_routers import silent_routers
from mmscale.runtime.disk_writer import replacing
from mmscale.runtime.groups import from_first
from mmscale.tables.routings import Routing
from mmscale.train.hooks import held_out_line
from mmscale.train.log.layers_log import LayersHook
from mmscale.train.loop import Hook
from mmscale.train.stage_state import StageState
from mmscale.train.stages.built import StageInputs, StageServices
from mmscale.train.stages.origin import main_origin
from mmscale.train.stages.stage_report import REPORT, by_kind
from mmscale.train.state.router_state import (
    RouterState,
    load_main_tensors,
    load_router_tensors,
    main_tensors,
    router_tensors,
)
from mmscale.train.steps.auxiliary_routers import AuxiliaryTrainer, figures, set_thresholds, table
from mmscale.train.steps.batch import to_device
from mmscale.train.steps.router_step import RouterStepper
from mmscale.train.steps.step import Stepper
from mmscale.train.steps.step_report import StepReport

CALIBRATION = "calibration_s"


def unasked(main: Mapping[str, Any], tasks: Sequence[str]) -> list[str]:
    """A line if the main run asked questions that its stage does not ask, because they were named on the command line.

    Args:
        main: metadata of the main run's checkpoint.
        tasks: `train.tasks` of the stage.
    """
    config = main.get("config")
    asked = config.get("train", {}).get("tasks", []) if isinstance(config, dict) else []
    missing = ", ".join(str(one) for one in asked if one not in tasks)
    return [f"the run asked {missing}, and this stage does not: give it the same train.tasks"] if missing else []


class AuxiliaryStage:
    """The frozen model with its routers and their optimizer (`BuiltStage`).

    Raises:
        CheckpointError: the main run's checkpoint is damaged.
    """

    def __init__(self, given: StageInputs) -> None:
        self.given = given
        self.store = Store.of_run(given.run)
        first = given.env.is_first
        self.main_step: int = from_first(self.store.choose() if first else None)
        self._origin: dict[str, Any] = from_first(main_origin(self.store, self.main_step) if first else None)
        self.begins_from: dict[str, Any] = from_first(self.store.info(self.main_step) if first else None)
        models, progress = self._load_main()
        transformer = models[0].config
        modules = [Float16Module(transformer, model) if transformer.bf16 else model for model in models]
        trainer = AuxiliaryTrainer(given.config, transformer, modules, given.groups)
        forward = Stepper(given.settings, modules, None, given.groups)  # type: ignore[arg-type]
        self.stepper = RouterStepper(forward, trainer)
        self.state = RouterState(
            models,
            trainer,
            sequences=int(progress.get("sequences", 0)),
            stream=list(progress.get("stream", [])),
            metadata=sharded.metadata(),
            tokens_per_step=tokens_per_step(given.settings),
        )
        self.flops_per_token = flops_per_token(given.settings).forward

    def _load_main(self) -> tuple[list[Any], dict[str, Any]]:
        """The model with the main run's weights, and the counters of the main run."""
        given = self.given
        folder = self.store.path(self.main_step)
        manager = CheckpointManager(
            given.run,
            every=0,
            keep=1,
            attempt=0,
            info={},
            on_event=lambda *_, **__: None,
            allow_missing=given.config.checkpoint.allow_missing,
        )
        if problems := manager.problems(self.main_step):
            raise CheckpointError(
                f"{folder} is damaged: {integrity.describe(problems)}",
                remedy="start the main run again: it resumes from the newest intact checkpoint",
            )
        transformer = transformer_config(given.settings)
        models = build_chunks(given.settings, given.groups, transformer=transformer)
        wanted = main_tensors(models, sharded.metadata())
        loaded = sharded.read(folder, wanted, partly=True)
        load_main_tensors(models, loaded)
        if given.config.model.auxiliary.mode == "joint":  # the routers start from their state in the main run
            own = router_tensors(models, sharded.metadata())
            load_router_tensors(models, sharded.read(folder, own, partly=True))
        return models, dict(loaded.get("progress", {}))

    def origin(self) -> dict[str, Any]:
        """Identifies the main checkpoint that the routers belong to."""
        return {"auxiliary": {**self._origin, "width": self.given.settings.model.auxiliary_width}}

    def announce(self, *, attempt: int) -> list[str]:
        """Lines that say for which main checkpoint routers are trained."""
        assert self.state.trainer is not None
        size = sum(parameter.numel() for parameter in self.state.trainer.module.parameters())
        return [
            f"auxiliary routers of {self.given.run}@{self.main_step}: {size:,} parameters on this stage, step "
            f"{self.state.step} of {self.given.settings.train.steps}; everything else is frozen",
            "the loss of a step is that of the routers: cross entropy with batch routing's choices, 0.69 for guesses",
            *unasked(self.begins_from, self.given.settings.train.tasks),
        ]

    def hooks(self, tools: StageServices, batches: BatchLoader) -> list[Hook]:
        """Metrics of every layer; calibration of thresholds after the last step, before it is saved."""
        return [
            LayersHook(self.given.settings, groups=self.given.groups, metrics=tools.logs.metrics),
            CalibrationHook(self.given, self.stepper, self.state, tools=tools, batches=batches),
        ]

    def resumed(self, tools: StageServices) -> None:
        """Nothing: the only evaluation comes after the last step."""

    def is_complete(self) -> bool:
        """Whether the report of the last step is written."""
        return bool(from_first(self._is_reported() if self.given.env.is_first else None))

    def _is_reported(self) -> bool:
        try:
            report = bounded.read_object(self.given.folder / REPORT)
        except (OSError, ValueError):
            return False
        # Reports of older versions do not contain their step, and are accepted.
        return bool(
            report.get("main_step") == self.main_step and report.get("step", self.state.step) == self.state.step
        )

    def _other_data(self) -> list[str]:
        """The data sets of the stage if they are not those of the main checkpoint; empty: they are, or unknown."""
        config, trained = self.given.settings, known(self.begins_from)
        own = identities(config, read_blend(config))
        return [] if trained is None or same_documents(trained, own) else [one.path for one in own]

    def complete(self, tools: StageServices) -> None:
        """Evaluate the routers on held-out data: metrics of every layer, and losses compared with batch routing."""
        learning = RouterLearning(gradients=False)
        found: dict[str, dict[str, dict[str, float]]] = {}
        rows: list[dict[str, Any]] = []
        if tools.evaluate is None:
            tools.progress.say("there are no held-out documents: routers are not measured")
        else:
            for routing in (Routing.BATCH, Routing.CAUSAL):
                with tools.clock.measure("eval_s"):
                    measured = tools.evaluate(routing, learning=learning if routing is Routing.BATCH else None)
                for name, values in measured.items():
                    found.setdefault(name, {})[routing.value] = values
            rows = table(figures(learning, self.given.groups))
        for name, by_routing in found.items():
            for routing_name, values in by_routing.items():
                where, extent = HeldOut("loss", routing_name, name), str(tools.extents.get(name, ""))
                tools.progress.say(held_out_line(where, values, extent=extent))
        for line in silent_routers(rows):
            tools.progress.say(f"note: {line}")
        file = self.given.folder / REPORT
        if self.given.env.is_first:
            report = {
                **self._origin,
                "step": self.state.step,
                "other_data": self._other_data(),
                "routers": rows,
                "held_out": found.pop(SOURCES, {}),
                **by_kind(found),
            }
            replacing(file, json.dumps(report, indent=1).encode())()
        command = shell_command("eval", self.given.run, "--routing", "causal")
        tools.progress.say(f"figures of every layer: {file}, or {command}")


class CalibrationHook:
    """Sets thresholds after the last step, from the training batches that follow it.

    Args:
        given: `auxiliary.calibration_batches`, steps, process groups.
        stepper: runs the model.
        state: records that thresholds were set.
        tools: of the trainer.
        batches: gives the batches.
    """

    def __init__(
        self,
        given: StageInputs,
        stepper: RouterStepper,
        state: RouterState,
        *,
        tools: StageServices,
        batches: BatchLoader,
    ) -> None:
        self.given = given
        self.stepper = stepper
        self.state = state
        self.tools = tools
        self.batches = batches
        self.vocabulary = Vocabulary.from_config(given.settings.vocab)

    def on_step(self, state: StageState, report: StepReport) -> None:
        """Set thresholds after the last step; nothing on other steps."""
        number = self.given.config.auxiliary.calibration_batches
        if report.step != self.given.settings.train.steps or not number:
            return
        learning = RouterLearning(gradients=False, histograms=True)
        with self.tools.clock.measure(CALIBRATION):
            for _ in range(number):
                self.tools.beat()
                batches = [to_device(part, self.vocabulary) for part in next(self.batches).micro_batches]
                for batch in batches:
                    batch.params.learning = learning
                self.stepper.evaluate(batches)
            set_thresholds(learning, self.given.groups)
        self.state.calibrated = True
