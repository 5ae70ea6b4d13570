"""Finds out before ranks start that a stage is done, from its files and settings. No torch; no mirror is contacted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmscale.checkpoint.layout import Store
from mmscale.checkpoint.mirror.mirror_settings import MirrorSettings
from mmscale.checkpoint.mirror.uploads import generation_of, wanted_steps
from mmscale.checkpoint.mirror.worker import UPLOADED
from mmscale.config import Config
from mmscale.errors import ConfigError
from mmscale.runs.attempts import settings_file
from mmscale.runs.done import describe_done, has_finished
from mmscale.runs.events import read_events
from mmscale.runs.routes import recorded_config
from mmscale.train.preflight import newest_intact
from mmscale.train.stages.table import Stage


def already_done(stage: Stage, config: Config) -> str:
    """Why a start of a stage would do nothing, in one line; "": it would train, or complete what follows a last step.

    A start completes an interrupted evaluation, a save that only the memory tier holds, and copies in a mirror.

    Args:
        stage: the stage to start.
        config: the run's configuration.
    """
    run = Path(config.run.dir) / config.run.name
    folder = stage.folder(run)
    settings = stage.settings(config)
    steps = settings.train.steps
    _, info = newest_intact(Store.of_run(folder))
    step = info.get("step")
    if not isinstance(step, int) or step < steps:
        return ""
    if not config.checkpoint.resume or not has_finished(folder, step) or not _is_mirrored(stage, settings, run):
        return ""
    return f"{folder} is done: {describe_done(step=step, steps=steps, raised=stage.steps)}"


def _is_mirrored(stage: Stage, settings: Config, run: Path) -> bool:
    """Whether the stage's events say that each checkpoint which its mirror keeps was uploaded there.

    Args:
        stage: the stage.
        settings: the stage's.
        run: the run's folder.
    """
    folder = stage.folder(run)
    mirror = MirrorSettings.of_stage(settings, run=run, folder=folder)
    if mirror is None:
        return True
    store = Store.of_run(folder)
    wanted = {generation_of(store, step) for step in wanted_steps(store, mirror.retention)}
    uploads = [event for event in read_events(folder) if event["event"] == UPLOADED]
    same = {attempt: _mirror(folder, attempt) == settings.checkpoint.mirror for attempt in {*map(_attempt, uploads)}}
    uploaded = {str(one.get("name")) for one in uploads if same[_attempt(one)]}
    return all(one is not None and one.name in uploaded for one in wanted)


def _attempt(event: Mapping[str, Any]) -> int | None:
    attempt = event.get("attempt")
    return attempt if type(attempt) is int else None


def _mirror(folder: Path, attempt: int | None) -> str | None:
    """`checkpoint.mirror` of an attempt; None: none, or unknown."""
    try:
        return recorded_config(settings_file(folder, attempt)).checkpoint.mirror
    except ConfigError:
        return None
