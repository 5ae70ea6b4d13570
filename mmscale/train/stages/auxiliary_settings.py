"""Settings and checks of the auxiliary stage, used before any rank starts. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmscale.checkpoint.layout import Store
from mmscale.checkpoint.shape import check_shape
from mmscale.config import Config, OptimConfig
from mmscale.config.derived import with_auxiliary_routers
from mmscale.data.prepared.identity import compare, identities, known
from mmscale.data.prepared.manifest import Manifest
from mmscale.errors import ConfigError
from mmscale.train.preflight import check_function, check_ids, newest_intact
from mmscale.train.stages.origin import check_origin, folder_of, main_origin, with_share_of


def stage_config(config: Config) -> Config:
    """The run's configuration with the stage's steps, batches and optimizer, and with routers in the model."""
    stage, train = config.auxiliary, config.train
    settings = {
        "steps": stage.steps,
        "micro_batch_size": stage.micro_batch_size or train.micro_batch_size,
        "global_batch_size": stage.global_batch_size or train.global_batch_size,
        "eval_every": 0,  # evaluated only once, after the last step
        "stop_when": None,
    }
    checkpoint = config.checkpoint.model_copy(update={"every": stage.checkpoint_every, "early": 0, "keep_best": None})
    return with_auxiliary_routers(config).model_copy(
        update={
            "train": train.model_copy(update=settings),
            "optim": OptimConfig(**dict(stage.optim)),
            "checkpoint": checkpoint,
        }
    )


def check_model(config: Config) -> None:
    """Refuse a model in which nothing chooses among later tokens.

    Raises:
        ConfigError: neither experts nor Mixture-of-Depths layers choose among tokens.
    """
    if not config.model.routes:
        raise ConfigError(
            "--stage auxiliary: without Mixture-of-Depths "
            + (
                "token choice needs no auxiliary routers"
                if config.model.has_experts
                else "a dense model routes nothing"
            ),
            remedy="evaluate and sample it as it is: it is causal",
        )


def check_main(config: Config, blend: Mapping[Path, Manifest], yes: bool = False) -> None:
    """Refuse a main checkpoint for which the stage cannot train routers; no tensor is read.

    Args:
        config: the run's configuration.
        blend: folders and manifests of the training data.
        yes: the user has confirmed that the stage reads other data than the main run.

    Raises:
        ConfigError: a setting that determines the function of the main weights differs from the main checkpoint's, or
            the stage would begin on other data, which nobody has confirmed.
        DataError: the data was prepared with other tokenizers than the main run's.
        CheckpointError: there is no main checkpoint, it holds another model, or the stage's belongs to another one.
    """
    run = Path(config.run.dir) / config.run.name
    store = Store.of_run(run)
    newest = store.choose()
    where, info = str(store.path(newest)), store.info(newest)
    check_shape(config, info.get("shape", {}), where=where)
    check_ids(blend, info, where=where)
    portions = config.train.model_copy(update={"micro_batch_size": stage_config(config).train.micro_batch_size})
    check_function(config.model_copy(update={"train": portions}), info, where=where)
    own = Store.of_run(folder_of(run))
    found, saved = newest_intact(own)
    if saved:
        check_origin(Path(found), saved, main_origin(store, newest), config)
    elif not yes:
        _check_data(config, blend, info, where=where)


def _check_data(config: Config, blend: Mapping[Path, Manifest], info: Mapping[str, Any], *, where: str) -> None:
    """Refuse to begin on other data than the main run's: held-out losses of both would be compared in reports."""
    before = known(info)
    changed = [] if before is None else compare(before, identities(config, blend))[0]
    if changed:
        raise ConfigError(
            f"--stage auxiliary would read other data than {where}: {'; '.join(changed)}",
            remedy="give it the data of the main run (data.path, data.blend), or confirm with `mmscale train ... "
            "--yes`: its held-out losses are not comparable then",
        )


def with_main_share(config: Config) -> Config:
    """The configuration with `auto` shares replaced by those of the main checkpoint, whatever the data of the stage."""
    return with_share_of(config, Store.of_run(Path(config.run.dir) / config.run.name))
