"""The stages of a run by name: folder, settings and checks of each. Imports no torch: the launcher reads it.

What a stage computes is built by a function of the same name in mmscale/train/run.py, on the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mmscale.config import Config
from mmscale.train import preflight
from mmscale.train.stages import auxiliary_settings, origin

MAIN = "main"


class Preflight(Protocol):
    """Refuses a stage that cannot work, before any rank starts."""

    def __call__(self, config: Config, *, world_size: int, yes: bool = False, waits: bool = False) -> None:
        """Reads small files only, writes nothing.

        Args:
            config: the run's configuration.
            world_size: number of ranks.
            yes: the user has confirmed that the objective or the data change.
            waits: it starts when another job has ended, so checkpoints that it needs may not be there yet.

        Raises:
            MmscaleError: it cannot work.
        """


@dataclass(frozen=True)
class Stage:
    """One stage, as the command line, the launcher and the trainer know it.

    Attributes:
        name: as `--stage` takes it.
        help: what it trains.
        subfolder: where it lives below the run's folder; "": the run's folder itself.
        steps: the setting that holds its number of steps.
        optim: the settings of its optimizer.
        settings: gives the configuration that the trainer works with; steps, batches, optimizer and checkpoints of
            the stage stand in `train`, `optim` and `checkpoint`.
        inherit: gives the run's configuration with what it takes over from the checkpoint that it builds on.
        preflight: its checks.
    """

    name: str
    help: str
    subfolder: str
    steps: str
    optim: str
    settings: Callable[[Config], Config]
    inherit: Callable[[Config], Config]
    preflight: Preflight

    def folder(self, run: Path) -> Path:
        """Where the stage of a run lives: checkpoints, logs, launches."""
        return run / self.subfolder


def _main_preflight(config: Config, *, world_size: int, yes: bool = False, waits: bool = False) -> None:
    preflight.preflight(config, world_size=world_size, yes=yes)


def _unchanged(config: Config) -> Config:
    return config


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            name=MAIN,
            help="the model",
            subfolder="",
            steps="train.steps",
            optim="optim",
            settings=_unchanged,
            inherit=_unchanged,
            preflight=_main_preflight,
        ),
        Stage(
            name="auxiliary",
            help="its causal routers, after it, everything else frozen",
            subfolder=origin.FOLDER,
            steps="auxiliary.steps",
            optim="auxiliary.optim",
            settings=auxiliary_settings.stage_config,
            inherit=auxiliary_settings.with_main_share,
            preflight=auxiliary_settings.preflight,
        ),
    )
}


def of_folder(folder: Path) -> Stage:
    """The stage that lives in a folder: RUN/auxiliary is the auxiliary stage of RUN, any other folder a main run."""
    place = folder.absolute()
    for stage in STAGES.values():
        if stage.subfolder and place.name == stage.subfolder and _is_run(place.parent):
            return stage
    return STAGES[MAIN]


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() or any((folder / name).is_dir() for name in ("checkpoints", "launch"))
