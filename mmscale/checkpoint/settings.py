"""The configuration that wrote a checkpoint; every computation with a checkpoint uses its settings.

RUN/config.yaml belongs to the latest attempt, which may have other settings. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mmscale.checkpoint.shape import check_shape
from mmscale.config import Config
from mmscale.config.changes import completed
from mmscale.config.load import load
from mmscale.errors import CheckpointError, ConfigError

CONFIG = "config.yaml"


def config_of(info: Mapping[str, Any], *, where: Path, run: Path | None = None) -> Config:
    """The configuration of a checkpoint.

    Data sets are found by path and may have been moved: if the checkpoint's paths do not exist, those of the run's
    config.yaml are used if they exist.

    Args:
        info: the checkpoint's metadata.
        where: its folder, for messages.
        run: the run's folder; None if there is none, as for an archive. A checkpoint of a version that did not store
            the configuration uses the run's config.yaml.

    Raises:
        CheckpointError: there is no configuration, or it has another version.
        ConfigError: the run's config.yaml is needed and cannot be read.
    """
    saved = info.get("config")
    if isinstance(saved, Mapping):
        try:
            return _with_data(Config.model_validate(completed(saved)), run)
        except ValidationError as error:
            raise CheckpointError(
                f"{where} holds no configuration of this version: {str(error).splitlines()[0]}",
                remedy="use the version of mmscale that wrote it",
            ) from None
    if run is None or not (run / CONFIG).is_file():
        raise CheckpointError(f"{where} holds no configuration", remedy="use the version of mmscale that wrote it")
    config = load(run / CONFIG, recorded=True)
    check_shape(config, info.get("shape", {}), where=str(where))
    return config


def allows_missing(run: Path) -> bool:
    """Whether the run's config.yaml permits checkpoints that lack a part (`checkpoint.allow_missing`)."""
    config = _of_run(run)
    return config is not None and config.checkpoint.allow_missing


def _with_data(config: Config, run: Path | None) -> Config:
    if run is None or not config.data.sources:
        return config
    latest = _of_run(run)
    if latest is None:
        return config  # the later error about a missing folder then names the checkpoint's path
    data, now = config.data, latest.data
    sources, others = ([source.path for source in one.sources] for one in (data, now))
    if not _exist(sources) and others and _exist(others):
        data = data.model_copy(update={"path": now.path, "blend": now.blend})
    if not _exist(data.validation.values()) and now.validation and _exist(now.validation.values()):
        data = data.model_copy(update={"validation": now.validation})
    return config.model_copy(update={"data": data})


def _exist(folders: Iterable[str]) -> bool:
    return all(Path(folder).is_dir() for folder in folders)


def _of_run(run: Path) -> Config | None:
    """The configuration of the run's latest attempt; None if it cannot be read."""
    try:
        return load(run / CONFIG, recorded=True)
    except ConfigError:
        return None
