"""Settings and checks of the stage of supervised fine-tuning, used before any rank starts. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmscale.checkpoint.layout import Store
from mmscale.checkpoint.shape import check_shape
from mmscale.config import Config, OptimConfig
from mmscale.config.changes import function_changes
from mmscale.data.prepared.manifest import Manifest
from mmscale.errors import CheckpointError, ConfigError
from mmscale.train.preflight import check_ids, newest_intact
from mmscale.train.stages.origin import with_share_of

FOLDER = NAME = "sft"


def stage_config(config: Config) -> Config:
    """The run's configuration with the stage's data, steps, batches, evaluation and optimizer."""
    stage, train = config.sft, config.train
    data = {"path": stage.path, "blend": stage.blend, "prepare": None}
    settings = {
        "steps": stage.steps,
        "micro_batch_size": stage.micro_batch_size or train.micro_batch_size,
        "global_batch_size": stage.global_batch_size or train.global_batch_size,
        "eval_every": stage.eval_every,
        "tasks": stage.tasks,
        "loss_weights": None,  # a stage is too short for averages of losses
        "stop_when": None,  # it and keep_best may name losses of the main run's data
    }
    checkpoint = config.checkpoint.model_copy(update={"every": stage.checkpoint_every, "early": 0, "keep_best": None})
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=data),
            "train": train.model_copy(update=settings),
            "optim": OptimConfig(**dict(stage.optim)),
            "checkpoint": checkpoint,
        }
    )


def recorded(config: Config) -> Config:
    """The configuration in the stage's folder and checkpoints: that of a run, RUN/sft, as other commands read it."""
    run = config.run.model_copy(update={"dir": str(_run_of(config)), "name": NAME})
    return stage_config(config).model_copy(update={"run": run})


def check_model(config: Config) -> None:
    """Refuse a stage without data; every model can be fine-tuned.

    Raises:
        ConfigError: no conversations are named.
    """
    if config.sft.path is None and not config.sft.blend:
        raise ConfigError(
            "--stage sft: neither sft.path nor sft.blend is set",
            remedy="prepare conversations (`mmscale data prepare`), and name the folder: sft.path=DIR",
        )


def check_main(config: Config, blend: Mapping[Path, Manifest], yes: bool = False) -> None:
    """Refuse a main checkpoint that the stage cannot start from; no tensor is read.

    Args:
        config: the run's configuration.
        blend: folders and manifests of the conversations.
        yes: the user has confirmed that the model will compute another function than in the main run.

    Raises:
        ConfigError: a setting that determines the function of the weights differs from the main checkpoint's, which
            nobody has confirmed.
        DataError: the conversations were prepared with other tokenizers than the main run's data.
        CheckpointError: there is no main checkpoint, it holds another model, or the stage began from another one.
    """
    found, saved = newest_intact(Store.of_run(_run_of(config) / FOLDER))
    if saved:
        began = saved.get(NAME, {}).get("main_step")
        if config.sft.main_step not in (0, began):
            raise CheckpointError(
                f"{found} began from step {began} of the main run, sft.main_step is {config.sft.main_step}",
                remedy=f"set sft.main_step={began}, or remove {Path(found).parent.parent} to start again",
            )
        return
    store = Store.of_run(_run_of(config))
    step = main_step(config, store)
    where, info = str(store.path(step)), store.info(step)
    check_shape(config, info.get("shape", {}), where=where)
    check_ids(blend, info, where=where)
    before = info.get("config")
    changed = function_changes(before, stage_config(config)) if isinstance(before, dict) else []
    if changed and not yes:
        raise ConfigError(
            f"--stage sft would change what the model of {where} computes: {'; '.join(changed)}",
            remedy="restore these settings, or confirm with `mmscale train ... --stage sft --yes`",
        )


def main_step(config: Config, store: Store) -> int:
    """Step of the main checkpoint that the stage starts from.

    Raises:
        CheckpointError: there is none.
    """
    return store.choose(config.sft.main_step or None)


def with_share(config: Config) -> Config:
    """The configuration with `auto` shares replaced by those of the stage's checkpoint, or of the main one."""
    own = Store.of_run(_run_of(config) / FOLDER)
    if newest_intact(own)[1]:
        return with_share_of(config, own)
    store = Store.of_run(_run_of(config))
    return with_share_of(config, store, main_step(config, store))


def _run_of(config: Config) -> Path:
    return Path(config.run.dir) / config.run.name
