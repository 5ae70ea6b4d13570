"""Finds tasks of data sets, and those of `train.tasks`, before they are read. Also used on login nodes: no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmscale.config import Config
from mmscale.data.prepared.manifest import Manifest
from mmscale.errors import DataError


def having(name: str, blend: Mapping[Path, Manifest]) -> list[Path]:
    """The data sets that have a task of this name. The questions of the first one are used.

    Args:
        name: of the task.
        blend: manifests by folder, in the order of the configuration.
    """
    return [folder for folder, manifest in blend.items() if any(task.name == name for task in manifest.tasks)]


def names(blend: Mapping[Path, Manifest]) -> list[str]:
    """The tasks of all data sets, each name once."""
    return list(dict.fromkeys(task.name for manifest in blend.values() for task in manifest.tasks))


def named_tasks(config: Config, blend: Mapping[Path, Manifest]) -> dict[str, Path]:
    """Where each task of `train.tasks` is: a file of questions, or the first data set of the blend that has it.

    Raises:
        DataError: no data set has a task of that name, a file is missing, or two tasks have one name.
    """
    found: dict[str, Path] = {}
    for text in config.train.tasks:
        name, file = question_file(text)
        if name in found:
            raise DataError(f"train.tasks: two tasks are named {name}", remedy="give them names: NAME=FILE.jsonl")
        if file is not None and not file.is_file():
            raise DataError(f"train.tasks: {file} cannot be read: there is no such file", remedy="correct the path")
        place = next(iter(having(text, blend)), None) if file is None else file
        if place is None:
            known = names(blend)
            raise DataError(
                f"train.tasks: the data has no task {text!r} (it has: {', '.join(sorted(known)) or 'none'})",
                remedy="name one of these, or a file of questions: NAME=FILE.jsonl",
            )
        found[name] = place
    return found


def question_file(text: str) -> tuple[str, Path | None]:
    """Name and file of a task: `icons=which.jsonl` or `which.jsonl`; None: it does not name a file."""
    name, given, file = text.rpartition("=")
    path = Path(file)
    if path.suffix != ".jsonl":
        return text, None
    return (name if given else path.stem), path
