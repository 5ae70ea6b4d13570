"""Reads and checks files and folders that a command line names, before a command loads torch and a model."""

from __future__ import annotations

from pathlib import Path

from mmscale.errors import CheckpointError, ConfigError, DataError, UsageError, no_folder

BEST = "best"  # after an @, instead of a step


def existing(file: Path, *, what: str = "file", whose: str = "") -> Path:
    """The file, if it exists.

    Args:
        file: named by the user.
        what: it is, for the remedy.
        whose: beginning of the message.

    Raises:
        DataError: there is no such file.
    """
    if not file.exists():
        raise DataError(f"{whose}{file} cannot be read: there is no such file", remedy=f"name another {what}")
    return file


def check_model(folder: Path, step: int | None = None) -> None:
    """Refuse a folder that is neither an export nor a run with the checkpoint that a command reads.

    Args:
        folder: of a run or an export.
        step: of the checkpoint; None: the newest.

    Raises:
        CheckpointError: there is no such folder, or no such checkpoint in it.
    """
    from mmscale.checkpoint.layout import Store

    if not folder.is_dir():
        raise CheckpointError(no_folder(folder), remedy="name a folder run.dir/run.name, or an export")
    if not (folder / "config.json").is_file():
        Store.of_run(folder).choose(step)


def check_checkpoint(path: Path, step: int | None, *, verified: bool = False) -> None:
    """Refuse a name that is neither an archive nor a run with the checkpoint that a command reads.

    Args:
        path: a run's folder or an archive.
        step: of the checkpoint; None: the newest.
        verified: whether it must have a manifest, too.

    Raises:
        CheckpointError: there is no such checkpoint or archive, or its manifest shows damage.
    """
    from mmscale.checkpoint.layout import is_archive
    from mmscale.checkpoint.named import find, open_store

    if verified or not path.exists() or is_archive(path):
        find(path, step)
    else:  # of an early version, without a manifest
        open_store(path).choose(step)


def check_export(folder: Path) -> None:
    """Refuse a folder that holds no model of Hugging Face's format.

    Raises:
        CheckpointError: it, or its config.json, is missing.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{file} is missing", remedy="name a Hugging Face folder on this machine")


def check_set(folder: Path | None) -> None:
    """Refuse a folder of `--data` that is no prepared data set; None: the option was not given.

    Raises:
        DataError: it is missing, incomplete or damaged.
    """
    from mmscale.data.prepared.manifest import read_manifest

    if folder is not None:
        read_manifest(folder, setting="--data")


def split_step(text: str) -> tuple[Path, int | None]:
    """`runs/x@100` -> (runs/x, 100); `runs/x@best` -> (runs/x, step of the best checkpoint).

    Raises:
        UsageError: the text after the @ is not a step.
    """
    folder, at, step = text.rpartition("@")
    if not at:
        return Path(text), None
    if step.isdigit():
        return Path(folder), int(step)
    if step == BEST and not Path(text).exists():
        return Path(folder), _best_of(Path(folder))
    if "/" in step or Path(text).exists():  # the @ is part of the path
        return Path(text), None
    raise UsageError(f"{text}: {step!r} after the @ is not a step", remedy=f"write a number, e.g. {folder}@100")


def _best_of(run: Path) -> int:
    from mmscale.checkpoint.layout import Store

    if not run.is_dir():
        raise CheckpointError(no_folder(run), remedy="name another run")
    best = Store.of_run(run).best()
    if best is None:
        metric = _kept_best(run)
        if metric:
            raise UsageError(
                f"{run}@{BEST}: the run has saved none after an evaluation of {metric} (checkpoint.keep_best)",
                remedy="wait for one, or name a step",
            )
        raise UsageError(
            f"{run}@{BEST}: no checkpoint of this run is known to be the best one",
            remedy="name a step" if _is_stage(run) else "train with checkpoint.keep_best=eval/loss, or name a step",
        )
    return best


def _is_stage(run: Path) -> bool:
    """Whether it is the folder of a stage other than the main one: these keep no best checkpoint."""
    from mmscale.train.stages.table import MAIN, of_folder

    return of_folder(run).name != MAIN


def _kept_best(run: Path) -> str | None:
    """`checkpoint.keep_best` of a run's latest attempt; None: it is not set, or cannot be read."""
    from mmscale.config.document import read_file
    from mmscale.runs.attempts import settings_file

    try:
        found = read_file(settings_file(run, None)).data["checkpoint"]["keep_best"]
    except (ConfigError, KeyError, TypeError):
        return None
    return None if found is None else str(found)
