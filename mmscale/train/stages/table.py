"""The table of a run's stages: folder, settings and checks of each. Imports no torch, because the launcher reads it.

A function of the same name in mmscale/train/run.py builds the stage on the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmscale.checkpoint.layout import Store
from mmscale.config import Config, plugins
from mmscale.config.rules import check
from mmscale.data.prepared.manifest import Manifest, read_blend
from mmscale.data.stream.checks import check_data
from mmscale.train.preflight import check_ids, check_mirror, check_profile, check_resume, newest_intact
from mmscale.train.stages import auxiliary_settings, origin, sft_settings

MAIN = "main"


@dataclass(frozen=True)
class Stage:
    """The description of a stage for the command line, the launcher and the trainer.

    Attributes:
        name: value of `--stage`.
        help: what it trains.
        subfolder: its folder below the run's folder; "": the run's folder itself.
        steps: the setting that holds its number of steps.
        optim: the settings of its optimizer.
        settings: returns the configuration that the trainer works with; steps, batches, optimizer and checkpoints of
            the stage are in `train`, `optim` and `checkpoint`.
        inherit: returns the run's configuration with the values taken from the checkpoint that the stage builds on.
        check_model: refuses a model for which the stage has nothing to do.
        check_origin: refuses a checkpoint of another stage that this one cannot build on; called with the run's
            configuration, the manifests of its data, and whether a change of the data is confirmed.
        recorded: returns the configuration that its folder and checkpoints record: the run's, or that of the stage as a
            run by itself.
        loss: the name of a step's loss, if the stage logs none of each modality.
    """

    name: str
    help: str
    subfolder: str
    steps: str
    optim: str
    settings: Callable[[Config], Config]
    inherit: Callable[[Config], Config]
    check_model: Callable[[Config], None]
    check_origin: Callable[[Config, Mapping[Path, Manifest], bool], None]
    recorded: Callable[[Config], Config]
    loss: str = "all"

    def unused(self, config: Config) -> tuple[str, ...]:
        """Settings of the main run's evaluations that a configuration gives, and that have no effect in this stage."""
        own = self.settings(config)
        ignored = {
            "checkpoint.keep_best": config.checkpoint.keep_best is not None and own.checkpoint.keep_best is None,
            "train.stop_when": config.train.stop_when is not None and own.train.stop_when is None,
            "train.tasks": not set(config.train.tasks) <= set(own.train.tasks),
        }
        return tuple(key for key, is_ignored in ignored.items() if is_ignored)

    def folder(self, run: Path) -> Path:
        """Folder of the stage in a run: checkpoints, logs, launches."""
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
            waits: it starts after another job: the checkpoint that it builds on may not exist yet, and is checked
                later.
            from_scratch: the stage's own checkpoints are lost, and the user gives them up.
            plugins_here: ranks will see the packages that this process sees; otherwise only the ranks check plug-ins.

        Raises:
            ConfigError: the layout does not fit, a rank to profile does not exist, no data set is named, a new run
                would start in a folder with old checkpoints, a setting that determines the function of frozen weights
                differs from the main checkpoint's, or the objective or the data have changed since the newest
                checkpoint, or since the main one for a stage that begins.
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
        # The stage's batch sizes must fit the ranks too. The model is the run's, because a check would refuse the
        # fields that only a stage may set.
        check(settings.model_copy(update={"model": config.model}), world_size=world_size)
        store = Store.of_run(self.folder(Path(config.run.dir) / config.run.name))
        if settings.data.validation and not from_scratch:
            # Validation sets are compared with it, and would be blamed if it was prepared with other tokenizers.
            where, info = newest_intact(store)
            check_ids(read_blend(settings), info, where=where)
        blend = check_data(settings)
        if waits and self.subfolder:
            return
        self.check_origin(config, blend, yes)
        own = self.recorded(config)
        stage: dict[str, Any] = {"settings": self.settings, "optim": self.optim}
        check_resume(own, store, blend, yes=yes, from_scratch=from_scratch, **stage)


def _begins(config: Config, blend: Mapping[Path, Manifest], yes: bool) -> None:
    """The main stage builds on no checkpoint."""


def _trains_every_model(config: Config) -> None:
    """The main stage can train every model."""


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
            check_model=_trains_every_model,
            check_origin=_begins,
            recorded=_unchanged,
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
            recorded=_unchanged,
            loss="routers",
        ),
        Stage(
            name=sft_settings.NAME,
            help="the model on conversations, from the main run's weights, with a loss on answers only",
            subfolder=sft_settings.FOLDER,
            steps="sft.steps",
            optim="sft.optim",
            settings=sft_settings.stage_config,
            inherit=sft_settings.with_share,
            check_model=sft_settings.check_model,
            check_origin=sft_settings.check_main,
            recorded=sft_settings.recorded,
        ),
    )
}


def of_folder(folder: Path) -> Stage:
    """The stage that a folder belongs to: RUN/auxiliary is the auxiliary stage of RUN, any other folder a main run."""
    place = folder.absolute()
    for stage in STAGES.values():
        if stage.subfolder and place.name == stage.subfolder and _is_run(place.parent):
            return stage
    return STAGES[MAIN]


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() or any((folder / name).is_dir() for name in ("checkpoints", "launch"))
