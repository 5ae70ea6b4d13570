"""The main checkpoint that a stage builds on: recorded in the stage's checkpoints, checked here. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmscale.checkpoint import integrity
from mmscale.checkpoint.layout import Store
from mmscale.config import Config
from mmscale.config.derived import with_auxiliary_routers
from mmscale.errors import CheckpointError

FOLDER = "auxiliary"


def folder_of(run: Path) -> Path:
    """Folder of the auxiliary stage of a run."""
    return run / FOLDER


def main_origin(store: Store, step: int) -> dict[str, Any]:
    """Identifies the main checkpoint that a stage builds on: its step, and the digest of its manifest."""
    file = store.path(step) / integrity.MANIFEST
    content = file.read_bytes() if file.is_file() else b""
    return {"main_step": step, "main_digest": hashlib.sha256(content).hexdigest()[:16]}


def with_share_of(config: Config, store: Store, step: int | None = None) -> Config:
    """The configuration with `auto` shares of modalities replaced by those of a checkpoint.

    Args:
        config: of a stage that builds on the checkpoint.
        store: has the checkpoint.
        step: its step; None: the newest.

    Raises:
        CheckpointError: there is none.
    """
    info = store.info(store.choose(step))
    share = info.get("config", {}).get("model", {}).get("experts", {}).get("share")
    if config.model.experts.share != "auto" or not isinstance(share, dict):
        return config
    experts = config.model.experts.model_copy(update={"share": share})
    return config.model_copy(update={"model": config.model.model_copy(update={"experts": experts})})


def find_routers(run: Path, main_step: int) -> tuple[Path, int] | None:
    """The stage's newest checkpoint that was trained for this main checkpoint: its folder and width; None: none.

    Raises:
        CheckpointError: it is damaged.
    """
    own = Store.of_run(folder_of(run))
    origin = main_origin(Store.of_run(run), main_step)
    for step in reversed(own.steps()):
        saved = own.info(step).get("auxiliary", {})
        if {key: saved.get(key) for key in origin} == origin:
            integrity.require_intact(own.path(step), step=step)
            return own.path(step), int(saved["width"])
    return None


def check_origin(folder: Path, info: Mapping[str, Any], origin: Mapping[str, Any], config: Config) -> None:
    """Refuse to continue with routers of another main checkpoint, or of another width.

    Args:
        folder: the stage's checkpoint from which it would resume.
        info: that checkpoint's metadata.
        origin: of the main checkpoint that it would use.
        config: the run's configuration.

    Raises:
        CheckpointError: they do not belong together.
    """
    saved, stage = info.get("auxiliary", {}), folder.parent.parent
    if {key: saved.get(key) for key in origin} != origin:
        raise CheckpointError(
            f"{stage} holds routers for step {saved.get('main_step')} of the main run, whose newest "
            f"checkpoint is another one (step {origin['main_step']})",
            remedy=f"remove {stage} to train routers for step {origin['main_step']}",
        )
    width = with_auxiliary_routers(config).model.auxiliary_width
    if saved.get("width") != width:
        raise CheckpointError(
            f"{folder} holds routers of width {saved.get('width')}, model.auxiliary.width is {width}",
            remedy=f"restore the width, or remove {stage} to start again",
        )
