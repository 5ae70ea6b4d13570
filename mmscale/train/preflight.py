"""Checks whether a stage can resume from its checkpoints; `Stage.preflight` calls it before any rank starts.

It reads a few small files, writes nothing, and imports no torch, so that the launcher reports problems within a second.
mmscale/data/stream/checks.py checks the data.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mmscale.checkpoint import integrity
from mmscale.checkpoint.layout import INFO, Store
from mmscale.checkpoint.mirror.remote import require_package
from mmscale.checkpoint.shape import check_frozen, check_shape
from mmscale.config import Config
from mmscale.config.changes import changes, describe, function_changes
from mmscale.config.effects import Effect
from mmscale.data.prepared.identity import SourceIdentity, compare, identities, known
from mmscale.data.prepared.manifest import (
    Manifest,
    by_modality,
    check_tokenizers,
    common_tokenizers,
    read_blend,
    read_manifest,
)
from mmscale.data.prepared.validation import read_validation, replaced
from mmscale.errors import ConfigError, MmscaleError
from mmscale.tables.plugins import PluginError
from mmscale.train.optim.schedule import around
from mmscale.train.scratch import check_scratch

JUMP = 2.0  # the user must confirm a change that increases the next learning rate by more than this factor
_SAME = 0.01  # relative difference of two learning rates below which no change is reported


def check_resume(
    config: Config,
    store: Store,
    blend: Mapping[Path, Manifest],
    *,
    yes: bool,
    settings: Callable[[Config], Config] = lambda config: config,
    optim: str = "optim",
    from_scratch: bool = False,
) -> None:
    """Refuse to resume from the newest checkpoint of a stage if something does not fit.

    Args:
        config: the run's configuration.
        store: the stage's checkpoints.
        blend: folders and manifests of the training data.
        yes: the user has confirmed a change of the objective or the data.
        settings: returns the stage's configuration.
        optim: name of the settings of the stage's optimizer.
        from_scratch: ignore lost checkpoints.

    Raises:
        ConfigError: a new run would start in a folder with old checkpoints, or the objective or the data have changed
            since the newest one.
        DataError: the data was prepared with other tokenizers than the newest checkpoint's.
        CheckpointError: the newest checkpoint holds another model, all are damaged, or all are lost.
    """
    if from_scratch:
        check_scratch(store)
        return
    newest = store.newest()
    if newest is None:
        return
    if not config.checkpoint.resume:
        # Retention and the next start select checkpoints by step number, and would prefer the old run's later ones.
        raise ConfigError(
            f"checkpoint.resume is false, but {store.root} holds checkpoints up to step {newest}",
            remedy="start a new run with another run.name, or remove that folder",
        )
    where, info = newest_intact(store)
    if info:
        check_shape(config, info.get("shape", {}), where=where)
        check_frozen(config, info, where=where)
        check_ids(blend, info, where=where)
        data = identities(config, blend) if known(info) is not None else None
        check_changes(config, info, where=where, yes=yes, data=data, settings=settings, optim=optim)


def check_changes(
    config: Config,
    info: Mapping[str, Any],
    *,
    where: str,
    yes: bool,
    data: Sequence[SourceIdentity] | None = None,
    settings: Callable[[Config], Config] = lambda config: config,
    optim: str = "optim",
) -> list[str]:
    """The settings that changed since a checkpoint, one line each, and changes of its data.

    Args:
        config: this run's configuration.
        info: the checkpoint's metadata.
        where: its name, for the message.
        yes: the user has confirmed that the objective or the data change.
        data: the data that is going to be read; None: found through the configuration.
        settings: returns the configuration of the checkpoint's stage.
        optim: name of the settings of the stage's optimizer, for the message.

    Raises:
        ConfigError: the objective or the data change, or the learning rate would jump, and the user has not confirmed
            it.
    """
    saved = info.get("config")
    if not isinstance(saved, dict):  # written by a version that did not store the configuration
        return []
    found = changes(saved, config)
    before = known(info)
    if before is not None and data is None:
        data = identities(config, read_blend(config))
    other, moved = ([], []) if before is None else compare(before, data or ())
    if before is not None or not _names_data(saved):
        found = [change for change in found if change.effect is not Effect.DATA]
    asked = describe(found, confirmed=True) + other
    if asked and not yes:
        raise ConfigError(
            f"the objective or the data have changed since {where}: {'; '.join(asked)}",
            remedy="restore these settings, start another run.name, or confirm with `mmscale train ... --yes`",
        )
    rate = _learning_rates(config, saved, info, settings)
    if rate is not None and rate.jumps and not yes:
        whole = f"{optim}.phases=[] " if settings(config).optim.phases else ""  # phases would end what is proposed
        raise ConfigError(
            f"the learning rate would jump after {where}: {rate}",
            remedy=f"hold it ({whole}{optim}.schedule=constant {optim}.lr={rate.before:.3g}), "
            f"{_warm_up(rate, settings(config), optim)}or confirm with `mmscale train ... --yes`",
        )
    said = asked + describe(found, confirmed=False) + moved + ([] if rate is None else [str(rate)])
    return said + (replaced(info, read_validation(config, read_blend(config))) if info.get("validation") else [])


@dataclass(frozen=True)
class _Rate:
    """Learning rates before and after a change of settings.

    Attributes:
        step: steps done.
        before: of the next step by the old settings, or of their last step if they are done.
        after: of the next step by the new settings.
    """

    step: int
    before: float
    after: float

    def __str__(self) -> str:
        factor = f" (x {self.after / self.before:.3g})" if self.before > 0.0 else ""
        return f"learning rate: {self.before:.3g} -> {self.after:.3g} at step {self.step + 1}{factor}"

    @property
    def jumps(self) -> bool:
        """Whether the user should confirm the change: Adam's moments were built up with the small rate."""
        return self.after > JUMP * self.before


def _learning_rates(
    config: Config, saved: Mapping[str, Any], info: Mapping[str, Any], settings: Callable[[Config], Config]
) -> _Rate | None:
    """The learning rates before and after. None: the next step's rate is unchanged, or nothing is trained yet."""
    step = info.get("step")
    if not isinstance(step, int) or step < 1:
        return None
    now = settings(config)
    try:
        then = settings(Config.model_validate(saved))
    except ValidationError:  # the settings were written by another version
        return None
    try:
        before, after = around(then, now, step=step)
    except PluginError:
        if now.optim.schedule == then.optim.schedule:
            raise
        return None  # the checkpoint's schedule is a plug-in that is not installed any more, so its rate is unknown
    return None if math.isclose(before, after, rel_tol=_SAME) else _Rate(step, before, after)


def _warm_up(rate: _Rate, config: Config, optim: str) -> str:
    """The remedy of a warm-up whose first step is no jump; without numbers or empty if the steps that are left are few.

    Args:
        rate: that jumps.
        config: of the stage.
        optim: name of the settings of its optimizer.
    """
    whole = f"{optim}.phases=[] " if config.optim.phases else ""
    least = math.ceil(config.optim.lr / (JUMP * rate.before)) if rate.before > 0.0 else math.inf
    restarts = config.optim.restart == rate.step
    if least <= config.train.steps - rate.step:
        how = f"more slowly ({whole}" if restarts else f"again ({whole}{optim}.restart={rate.step} "
        return f"warm up {how}{optim}.warmup={least}), "
    return "" if restarts else f"warm up again ({whole}{optim}.restart={rate.step} and {optim}.warmup), "


def check_profile(config: Config, *, world_size: int) -> None:
    """Refuse to profile a rank that the run does not have.

    Raises:
        ConfigError: a rank of `log.profile.ranks` is too large.
    """
    ranks = () if config.log.profile is None else config.log.profile.ranks
    missing = [rank for rank in ranks if rank >= world_size]
    if missing:
        raise ConfigError(
            f"log.profile.ranks: there is no rank {missing[0]} among {world_size}", remedy="ranks count from 0"
        )


def check_mirror(config: Config) -> None:
    """Refuse a mirror if no package for its protocol is installed. The store itself is contacted only during training.

    Raises:
        ConfigError: the package is missing.
    """
    if config.checkpoint.mirror is not None:
        require_package(config.checkpoint.mirror)


def check_function(config: Config, info: Mapping[str, Any], *, where: str) -> None:
    """Refuse a stage whose frozen weights would compute a different function than in the checkpoint they come from.

    Args:
        config: the stage's configuration.
        info: the main checkpoint's metadata.
        where: its name, for the message.

    Raises:
        ConfigError: a setting that determines the weights' function has changed; `--yes` does not override this.
    """
    saved = info.get("config")
    found = function_changes(saved, config) if isinstance(saved, dict) else []
    if found:
        raise ConfigError(
            f"the stage would train on another function than that of {where}: {'; '.join(found)}",
            remedy="restore these settings: a stage trains what belongs to the main run's own model",
        )


def _names_data(saved: Mapping[str, Any]) -> bool:
    """Whether a configuration names data. That of an imported model does not; its first data is no change then."""
    data = saved.get("data") or {}
    return bool(data.get("path") or data.get("blend"))


def check_ids(blend: Mapping[Path, Manifest], info: Mapping[str, Any], *, where: str) -> None:
    """Refuse data whose token ids have another meaning than in a checkpoint; `--yes` does not override this.

    Args:
        blend: folders and manifests of the data sets.
        info: the checkpoint's metadata.
        where: its name, for the message.

    Raises:
        DataError: a tokenizer differs.
    """
    learned = info.get("tokenizers") or {}  # older checkpoints have no such entry
    for folder, manifest in blend.items():
        check_tokenizers(folder, manifest.tokenizers, learned, where=where, like=_trained_on(info, learned))


def _trained_on(info: Mapping[str, Any], wanted: Mapping[str, str]) -> Path | None:
    """A data set of the checkpoint that still has the tokenizers it was trained with; None: there is none."""
    for source in known(info) or ():
        folder = Path(source.path)
        with contextlib.suppress(MmscaleError):
            if read_manifest(folder).tokenizers == by_modality(wanted):
                return folder
    return None


def tokenizers_of(run: Path, data: Mapping[str, str]) -> dict[str, str]:
    """Tokenizer fingerprints for a run's next checkpoints: those of its data, and those of all earlier data.

    A run that continues with text only still knows the image codes of its earlier tokenizer.

    Args:
        run: the run's folder.
        data: fingerprints of the data's tokenizers.
    """
    where, info = newest_intact(Store.of_run(run))
    return common_tokenizers({Path(where): info.get("tokenizers") or {}, run: data})


def newest_intact(store: Store) -> tuple[str, dict[str, Any]]:
    """The newest checkpoint that looks intact: its path and its metadata; empty if there is none."""
    for step in reversed(store.steps()):
        if _looks_intact(store, step):
            return str(store.path(step)), store.info(step)
    return "", {}


def _looks_intact(store: Store, step: int) -> bool:
    """Whether a checkpoint's metadata is intact. Ranks read and hash the rest when they load it."""
    folder = store.path(step)
    try:
        manifest = integrity.read_manifest(folder)
        return not integrity.structure(folder, manifest) and not integrity.content(folder, manifest, [INFO])
    except integrity.NoManifestError:
        return not store.promises_manifest(step)
    except integrity.DamagedError:
        return False
