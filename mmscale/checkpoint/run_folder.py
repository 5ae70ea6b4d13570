"""A run folder that gets a checkpoint from elsewhere: it must have none, and needs a configuration. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmscale.checkpoint.layout import Store
from mmscale.config import yaml_text
from mmscale.errors import CheckpointError
from mmscale.runtime.atomic_files import write_atomic


def refuse_checkpoints(run: Path) -> None:
    """Refuse a run that has checkpoints, because the next start would choose among old and new ones by step.

    Raises:
        CheckpointError: the run has committed checkpoints, or is not a folder.
    """
    if run.exists() and not run.is_dir():
        raise CheckpointError(f"{run} is not a folder", remedy="name a new run folder")
    steps = Store.of_run(run).steps()
    if steps:
        raise CheckpointError(
            f"{run} has checkpoints already (newest: step {steps[-1]})",
            remedy="name a new run folder, or move these checkpoints away",
        )


def write_config(run: Path, config: Any, *, folder: Path | None = None) -> None:
    """Write the source's configuration with this run's name, for evaluation and resuming.

    Args:
        run: the run, which the configuration names.
        config: the source's.
        folder: to write into, for a stage of the run; None: the run's folder.
    """
    folder = folder or run
    file = folder / "config.yaml"
    if file.exists() or not isinstance(config, dict):
        return
    settings = config | {"run": {**config.get("run", {}), "dir": str(run.parent), "name": run.name}}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(file, yaml_text.dump(settings))
