"""The table of a run's stages: folder, settings and checks of each. Imports no torch, because the launcher reads it.

A function of the same name in mmscale/train/run.py builds the stage on the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mmscale.checkpoint.layout import Store
from mmscale.config import Config, plugins
from mmscale.config.rules import check
from mmscale.data.prepared.manifest import Manifest
from mmscale.data.stream.checks import check_data
from mmscale.train.preflight import check_mirror, check_profile, check_resume
from mmscale.train.stages import auxiliary_settings, origin

MAIN = "main"


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
        check_model: refuses a model that the stage has nothing to do for.
        check_origin: refuses a checkpoint of another stage that this one cannot build on; is given the run's
            configuration and the manifests of its data.
    """

    name: str
    help: str
    subfolder: str
    steps: str
    optim: str
    settings: Callable[[Config], Config]
    inherit: Callable[[Config], Config]
    check_model: Callable[[Config], None]
    check_origin: Callable[[Config, Mapping[Path, Manifest]], None]

    def folder(self, run: Path) -> Path:
        """Where the stage of a run lives: checkpoints, logs, launches."""
        return run / self.subfolder

    def preflight(
        self,
        config: Config,
        *,
        world_size: int,
        yes: bool = False,
        waits: bool = False,
        from_scratch: bool = False,
        plugins_here: bool = True,
    ) -> None:
        """Refuse a stage that cannot work, before any rank starts. Reads small files only, and writes nothing.

        Args:
            config: the run's configuration.
            world_size: number of ranks.
            yes: the user has confirmed that the objective or the data change.
            waits: it starts when another job has ended: the checkpoint that it builds on may not be there yet, and is
                looked at then.
            from_scratch: the stage's own checkpoints are lost, and given up.
            plugins_here: ranks will see the packages that this process sees; otherwise they load plug-ins first.

        Raises:
            ConfigError: the layout does not fit, a rank to profile does not exist, no data set is named, a new run
                would start among old checkpoints, a setting is not the main checkpoint's that decides what its frozen
                weights compute, or the objective or the data have changed since the newest checkpoint.
            DataError: as for `mmscale.data.stream.checks.check_data`; or the data was prepared with other tokenizers
                than that of the checkpoints.
            CheckpointError: a checkpoint is missing, belongs to another model or to another main run, or all are
                damaged.
        """
        self.check_model(config)
        check(config, world_size=world_size)
        check_profile(config, world_size=world_size)
        if plugins_here:
            plugins.check(config)
            check_mirror(config)
        settings = self.settings(config)
        # A stage's own portions must fit the ranks too. What it sets in the model is refused in files.
        check(settings.model_copy(update={"model": config.model}), world_size=world_size)
        blend = check_data(settings)
        if waits and self.subfolder:
            return
        self.check_origin(config, blend)
        store = Store.of_run(self.folder(Path(config.run.dir) / config.run.name))
        check_resume(config, store, blend, yes=yes, settings=self.settings, from_scratch=from_scratch)


def _begins(config: Config, blend: Mapping[Path, Manifest]) -> None:
    """The main stage builds on nothing."""


def _anything(config: Config) -> None:
    """Every model has a main stage."""


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
            check_model=_anything,
            check_origin=_begins,
        ),
        Stage(
            name="auxiliary",
            help="its causal routers, after the main run, with all other weights frozen",
            subfolder=origin.FOLDER,
            steps="auxiliary.steps",
            optim="auxiliary.optim",
            settings=auxiliary_settings.stage_config,
            inherit=auxiliary_settings.with_main_share,
            check_model=auxiliary_settings.check_model,
            check_origin=auxiliary_settings.check_main,
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
