"""The auxiliary stage before any rank starts: its settings and checks. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from mmscale.checkpoint.layout import Store
from mmscale.checkpoint.shape import check_shape
from mmscale.config import Config
from mmscale.config.derived import with_auxiliary_routers
from mmscale.config.rules import check
from mmscale.data.manifest import read_blend
from mmscale.errors import ConfigError
from mmscale.train.preflight import check_changes, check_function, check_ids
from mmscale.train.stages.origin import check_origin, folder_of, main_origin


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


def preflight(config: Config, *, world_size: int, yes: bool = False, waits: bool = False) -> None:
    """Refuse a stage that cannot work, before any rank starts; no tensor is read.

    Args:
        config: the run's configuration.
        world_size: number of ranks.
        yes: the user has confirmed that the objective or the data change.
        waits: it starts when the main run has ended; what depends on its checkpoint is looked at then.

    Raises:
        ConfigError: the model routes nothing, the layout does not fit, no data set is named, a setting is not the
            main checkpoint's that decides what its weights compute, or the objective or the data have changed since
            the stage's newest checkpoint.
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
    if waits:
        return
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
        step = own.steps()[-1]
        check_origin(own, step, main_origin(store, newest), config)
        check_changes(config, own.info(step), where=str(own.path(step)), settings=stage_config, yes=yes)


def with_main_share(config: Config) -> Config:
    """The configuration whose `auto` shares are those that the main checkpoint was trained with, on whatever data."""
    store = Store.of_run(Path(config.run.dir) / config.run.name)
    info = store.info(store.choose())
    share = info.get("config", {}).get("model", {}).get("experts", {}).get("share")
    if config.model.experts.share != "auto" or not isinstance(share, dict):
        return config
    experts = config.model.experts.model_copy(update={"share": share})
    return config.model_copy(update={"model": config.model.model_copy(update={"experts": experts})})
