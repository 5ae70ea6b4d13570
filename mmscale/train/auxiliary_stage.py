"""`mmscale train CONFIG --stage auxiliary`: trains the auxiliary routers of a run whose main part has a checkpoint.

Everything else is frozen and only goes forward. The stage lives in `<run>/auxiliary`: its own checkpoints (routers,
thresholds and their optimizer; the main weights stay where they are), metrics.jsonl, events.jsonl and report.json. It
is resumed like a run, and goes on under any layout. Puts the parts of this stage together, as run.py does for the main
one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from pathlib import Path
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module

from mmscale.checkpoint import integrity, sharded
from mmscale.checkpoint.layout import Store
from mmscale.checkpoint.manager import CheckpointManager
from mmscale.checkpoint.shape import check_shape, shape_of
from mmscale.config import Config
from mmscale.config.derived import tokens_per_step, with_auxiliary_routers
from mmscale.config.load import digest
from mmscale.config.rules import check
from mmscale.data.loader import BatchLoader
from mmscale.data.manifest import read_blend
from mmscale.data.mixture import Mixture, open_mixture
from mmscale.data.vocab import Vocabulary
from mmscale.errors import CheckpointError, ConfigError, TrainingError
from mmscale.model.auxiliary import RouterLearning
from mmscale.model.build import build_chunks, transformer_config
from mmscale.model.mixed_modal import Routing
from mmscale.resilience.lease import Fence
from mmscale.resilience.signals import StopRequest
from mmscale.runtime import device
from mmscale.runtime import groups as process_groups
from mmscale.runtime.environment import code_version
from mmscale.runtime.groups import from_first
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.auxiliary import (
    AuxiliaryTrainer,
    RouterState,
    RouterStep,
    figures,
    load_main_tensors,
    load_router_tensors,
    main_tensors,
    router_tensors,
    set_thresholds,
    summary,
    table,
)
from mmscale.train.batch import Batch, to_device
from mmscale.train.evaluate import evaluate
from mmscale.train.loop import is_logged
from mmscale.train.metrics import next_attempt
from mmscale.train.parts import loader_of, resolve_share, start
from mmscale.train.preflight import check_function, check_ids
from mmscale.train.progress import Progress
from mmscale.train.records import open_records
from mmscale.train.run import FINISHED, STOPPED
from mmscale.train.schedule import learning_rate
from mmscale.train.step import Stepper

FOLDER = "auxiliary"
REPORT = "report.json"


def folder_of(run: Path) -> Path:
    """Where the stage of a run lives."""
    return run / FOLDER


def stage_config(config: Config) -> Config:
    """The run's configuration with the stage's steps, batches and optimizer, and routers in the model."""
    stage, train = config.auxiliary, config.train
    settings = {
        "steps": stage.steps,
        "micro_batch_size": stage.micro_batch_size or train.micro_batch_size,
        "global_batch_size": stage.global_batch_size or train.global_batch_size,
    }
    checkpoint = config.checkpoint.model_copy(update={"every": stage.checkpoint_every})
    return with_auxiliary_routers(config).model_copy(
        update={"train": train.model_copy(update=settings), "optim": stage.optim, "checkpoint": checkpoint}
    )


def preflight(config: Config, *, world_size: int) -> None:
    """Refuse a stage that cannot work, before any rank starts; no tensor is read.

    Raises:
        ConfigError: the model routes nothing, the layout does not fit, no data set is named, or a setting is not the
            main checkpoint's that decides what its weights compute.
        DataError: a data set is missing, or was prepared with another vocabulary or with other tokenizers than the
            main run's.
        CheckpointError: there is no main checkpoint, it holds another model, or the stage's belongs to another one.
    """
    if not config.model.routes:
        raise ConfigError(
            "--stage auxiliary: a dense model without Mixture-of-Depths routes nothing",
            remedy="evaluate and sample it as it is: it is causal",
        )
    check(config, world_size=world_size)
    # The stage's own portions must fit the ranks too. Its mode is set by itself, which the rules refuse in files.
    staged = stage_config(config)
    check(staged.model_copy(update={"model": config.model}), world_size=world_size)
    blend = read_blend(config)
    run = Path(config.run.dir) / config.run.name
    store = Store.of_run(run)
    newest = store.choose()
    where, info = str(store.path(newest)), store.info(newest)
    check_shape(config, info.get("shape", {}), where=where)
    check_ids(blend, info, where=where)
    portions = config.train.model_copy(update={"micro_batch_size": staged.train.micro_batch_size})
    check_function(config.model_copy(update={"train": portions}), info, where=where)
    own = Store.of_run(folder_of(run))
    if own.steps():
        _check_origin(own, own.steps()[-1], main_origin(store, newest), config)


def main_origin(store: Store, step: int) -> dict[str, Any]:
    """What identifies the main checkpoint that routers belong to: step, and digest of its manifest."""
    file = store.path(step) / integrity.MANIFEST
    content = file.read_bytes() if file.is_file() else b""
    return {"main_step": step, "main_digest": hashlib.sha256(content).hexdigest()[:16]}


def find_routers(run: Path, main_step: int) -> tuple[Path, int] | None:
    """The newest checkpoint of the stage that was trained for this main checkpoint: its folder and width; None: none.

    Raises:
        CheckpointError: it is damaged.
    """
    own = Store.of_run(folder_of(run))
    origin = main_origin(Store.of_run(run), main_step)
    for step in reversed(own.steps()):
        saved = own.info(step).get("auxiliary", {})
        if {key: saved.get(key) for key in origin} == origin:
            integrity.require_whole(own.path(step), step=step)
            return own.path(step), int(saved["width"])
    return None


def _check_origin(own: Store, step: int, origin: dict[str, Any], config: Config) -> None:
    saved = own.info(step).get("auxiliary", {})
    if {key: saved.get(key) for key in origin} != origin:
        raise CheckpointError(
            f"{own.root.parent} holds routers for step {saved.get('main_step')} of the main run, whose newest "
            f"checkpoint is another one (step {origin['main_step']})",
            remedy=f"remove {own.root.parent} to train routers for step {origin['main_step']}",
        )
    width = with_auxiliary_routers(config).model.auxiliary_width
    if saved.get("width") != width:
        raise CheckpointError(
            f"{own.path(step)} holds routers of width {saved.get('width')}, model.auxiliary.width is {width}",
            remedy=f"restore the width, or remove {own.root.parent} to start anew",
        )


def main(config: Config, env: RankEnv) -> int:
    """Run one attempt of the stage on this rank.

    Args:
        config: the run's configuration, as for the main run.
        env: this process's place among the ranks.

    Returns:
        0: trained and calibrated; 75: stopped on request after a committed save.

    Raises:
        MmscaleError: something that the user can mend; the same on every rank where it can be.
    """
    preflight(config, world_size=env.world_size)
    config = resolve_share(_with_main_share(config))
    staged = stage_config(config)
    vocabulary = Vocabulary.from_config(config.vocab)
    train_data = open_mixture(staged, "train", vocabulary=vocabulary)
    held_out = open_mixture(staged, "validation", vocabulary=vocabulary)
    groups = start(staged, env)
    try:
        with StopRequest() as stop:
            return _Stage(config, staged, env, groups, train_data, held_out, stop).attempt()
    finally:
        process_groups.finalize()


def _with_main_share(config: Config) -> Config:
    """The configuration whose `auto` shares are those that the main checkpoint was trained with, on whatever data."""
    store = Store.of_run(Path(config.run.dir) / config.run.name)
    info = store.info(store.choose())
    share = info.get("config", {}).get("model", {}).get("experts", {}).get("share")
    if config.model.experts.share != "auto" or not isinstance(share, dict):
        return config
    experts = config.model.experts.model_copy(update={"share": share})
    return config.model_copy(update={"model": config.model.model_copy(update={"experts": experts})})


class _Stage:
    """One attempt. Every rank holds one; all its methods are called on every rank."""

    def __init__(
        self,
        config: Config,
        staged: Config,
        env: RankEnv,
        groups: ProcessGroupCollection,
        train_data: Mixture,
        held_out: Mixture,
        stop: StopRequest,
    ) -> None:
        self.main_run = Path(config.run.dir) / config.run.name
        self.folder = folder_of(self.main_run)
        self.config, self.staged = config, staged
        self.env, self.groups, self.stop = env, groups, stop
        self.train_data, self.held_out = train_data, held_out
        self.vocabulary = Vocabulary.from_config(config.vocab)
        self.store = Store.of_run(self.main_run)
        self.main_step = from_first(self.store.choose() if env.rank == 0 else None)
        self.origin = from_first(main_origin(self.store, self.main_step) if env.rank == 0 else None)

    def attempt(self) -> int:
        """Build, load, train, calibrate, save and report."""
        number = from_first(next_attempt(self.folder) if self.env.rank == 0 else None)
        with contextlib.ExitStack() as stack:
            self.progress = stack.enter_context(Progress(self.staged.train.steps, enabled=self.env.rank == 0))
            fence = Fence.of_rank(self.main_run, self.env.rank)
            self.records = stack.enter_context(
                open_records(self.folder, attempt=number, rank=self.env.rank, fence=fence)
            )
            models, consumed = self._load_main()
            transformer = models[0].config
            modules = [Float16Module(transformer, m) if transformer.bf16 else m for m in models]
            trainer = AuxiliaryTrainer(self.config, transformer, modules, self.groups)
            self.stepper = Stepper(self.staged, modules, None, self.groups)  # type: ignore[arg-type]
            state = RouterState(models, trainer, sequences=consumed, metadata=sharded.metadata())
            checkpoints = self._checkpoints(number)
            newest = checkpoints.choose()
            if newest is not None:
                checkpoints.load(state, newest)
            steps = self.staged.train.steps
            size = sum(p.numel() for p in trainer.module.parameters())
            self.progress.say(
                f"auxiliary routers of {self.main_run}@{self.main_step}: {size:,} parameters on this stage, step "
                f"{state.step} of {steps}; everything else is frozen"
            )
            if state.step >= steps:
                self.progress.say(f"{self.folder} is done: raise auxiliary.steps to go on")
                return FINISHED
            self.records.tell("start" if newest is None else "resume", step=state.step, main_step=self.main_step)
            loader = loader_of(self.staged, self.groups, self.train_data, consumed=state.sequences)
            stack.callback(loader.close)
            finished = self._fit(state, trainer, loader, checkpoints)
            self.records.tell("finish" if finished else "stop", step=state.step)
            if not finished:
                self.progress.say(f"stopped on request after step {state.step}; start it again to go on")
                return STOPPED
            self._report()
            return FINISHED

    def _load_main(self) -> tuple[list[Any], int]:
        """The model with the main run's weights, and the sequences that the main run has consumed."""
        folder = self.store.path(self.main_step)
        manager = CheckpointManager(
            self.main_run,
            every=0,
            keep=1,
            attempt=0,
            info={},
            on_event=lambda *_, **__: None,
            allow_missing=self.config.checkpoint.allow_missing,
        )
        if problems := manager.problems(self.main_step):
            raise CheckpointError(
                f"{folder} is damaged: {integrity.describe(problems)}",
                remedy="start the main run again: it goes on from the newest whole checkpoint",
            )
        transformer = transformer_config(self.staged)
        models = build_chunks(self.staged, self.groups, transformer=transformer)
        wanted = main_tensors(models, sharded.metadata())
        loaded = sharded.read(folder, wanted, partly=True)
        load_main_tensors(models, loaded)
        if self.config.model.auxiliary.mode == "joint":  # they go on from what the main run taught them
            own = router_tensors(models, sharded.metadata())
            load_router_tensors(models, sharded.read(folder, own, partly=True))
        return models, int(loaded.get("progress", {}).get("sequences", 0))

    def _checkpoints(self, attempt: int) -> CheckpointManager:
        width = self.staged.model.auxiliary_width
        return CheckpointManager(
            self.folder,
            every=self.staged.checkpoint.every,
            keep=self.staged.checkpoint.keep,
            attempt=attempt,
            info={
                "shape": shape_of(self.config),
                "config": self.config.model_dump(mode="json"),
                "config_digest": digest(self.config),
                "attempt": attempt,
                "auxiliary": {**self.origin, "width": width},
            },
            on_event=self.records.tell,
            seed=self.config.run.seed,
            code_version=code_version() if self.env.rank == 0 else "",
        )

    def _fit(
        self, state: RouterState, trainer: AuxiliaryTrainer, loader: BatchLoader, checkpoints: CheckpointManager
    ) -> bool:
        """Train to the last step, and calibrate. False: stopped on request after a save."""
        steps, began = self.staged.train.steps, time.monotonic()
        since = state.step
        while state.step < steps:
            number = state.step + 1
            lr = learning_rate(
                self.staged.optim, step=number, steps=steps, tokens=state.step * tokens_per_step(self.staged)
            )
            result = take_step(self.stepper, trainer, self._on_device(loader), lr=lr)
            if not result.applied:
                raise TrainingError(
                    f"the gradient of the auxiliary routers at step {number} is not finite",
                    remedy="lower auxiliary.optim.lr, or check the main run's checkpoint: `mmscale ckpt verify`",
                )
            state.step = number
            state.sequences += self.staged.train.global_batch_size
            if is_logged(self.staged, number):
                values = summary(trainer.figures())
                took = (time.monotonic() - began) / (number - since)
                began, since = time.monotonic(), number
                values |= {
                    "grad_norm": result.grad_norm,
                    "lr": lr,
                    "step_time_s": took,
                    "tokens_per_second": tokens_per_step(self.staged) / took,
                }
                if self.records.metrics is not None:
                    self.records.metrics.write(number, values)
                self.progress.update(number, values)
            if number == steps and self.config.auxiliary.calibration_batches:
                self._calibrate(state, loader)
            stop = self.stop.agreed(device.taken())
            last = stop or number == steps
            if last or checkpoints.due(number):
                checkpoints.save(state, last=last)
            if stop:
                break
        return state.step >= steps

    def _on_device(self, loader: BatchLoader) -> list[Batch]:
        return [to_device(part, self.vocabulary) for part in next(loader).micro_batches]

    def _calibrate(self, state: RouterState, loader: BatchLoader) -> None:
        """Set thresholds on training batches that come after the last step's."""
        learning = RouterLearning(gradients=False, histograms=True)
        for _ in range(self.config.auxiliary.calibration_batches):
            batches = self._on_device(loader)
            for batch in batches:
                batch.params.learning = learning
            self.stepper.evaluate(batches)
        set_thresholds(learning, self.groups)
        state.calibrated = True

    def _report(self) -> None:
        """What the routers are worth on held-out data: figures of every layer, and what causality costs."""
        learning = RouterLearning(gradients=False)
        found: dict[str, dict[str, float]] = {}
        for routing in (Routing.BATCH, Routing.CAUSAL):
            found[routing.value] = evaluate(
                self.staged,
                stepper=self.stepper,
                mixture=self.held_out,
                groups=self.groups,
                batches=self.staged.train.eval_batches,
                routing=routing,
                learning=learning if routing is Routing.BATCH else None,
            )
        rows = table(figures(learning, self.groups))
        for routing_name, values in found.items():
            shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items() if name != "z_loss")
            self.progress.say(f"held-out ({routing_name} routing)  {shown}")
        if self.env.rank == 0:
            report = {"main_step": self.main_step, "routers": rows, "held_out": found}
            temporary = self.folder / f"{REPORT}.tmp"
            temporary.write_text(json.dumps(report, indent=1))
            temporary.replace(self.folder / REPORT)
        self.progress.say(f"figures of every layer: {self.folder / REPORT}, or `mmscale eval RUN --routing causal`")


def take_step(stepper: Stepper, trainer: AuxiliaryTrainer, batches: list[Batch], *, lr: float) -> RouterStep:
    """One step of the routers: the model goes forward, nothing of it is differentiated, only routers change."""
    trainer.begin(batches)
    stepper.evaluate(batches)
    return trainer.step(lr=lr)
