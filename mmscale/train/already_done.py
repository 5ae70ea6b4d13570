"""Finds out before ranks start that a stage is done, from its files and settings. No torch."""

from __future__ import annotations

from pathlib import Path

from mmscale.checkpoint.layout import Store
from mmscale.config import Config
from mmscale.runs.done import describe_done, has_finished
from mmscale.train.preflight import newest_intact
from mmscale.train.stages.table import Stage


def already_done(stage: Stage, config: Config) -> str:
    """Why a start of a stage would do nothing, in one line; "": it would train, or complete what follows a last step.

    A start completes an interrupted evaluation, a save that only the memory tier holds, and copies in a mirror.

    Args:
        stage: the stage to start.
        config: the run's configuration.
    """
    folder = stage.folder(Path(config.run.dir) / config.run.name)
    steps = stage.settings(config).train.steps
    _, info = newest_intact(Store.of_run(folder))
    step = info.get("step")
    if not isinstance(step, int) or step < steps or config.checkpoint.mirror is not None:
        return ""
    if not config.checkpoint.resume or not has_finished(folder, step):
        return ""
    return f"{folder} is done: {describe_done(step=step, steps=steps, raised=stage.steps)}"
