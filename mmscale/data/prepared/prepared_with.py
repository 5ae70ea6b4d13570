"""Compares `data.prepare` of a configuration with the settings that its data was prepared with.

Training reads a data set as it is, so a setting that was given to `data prepare` alone makes the configuration, which
runs and exports record, wrong about the data. Reads source.json only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmscale.config import Config, PrepareConfig
from mmscale.data.prepared.folder import read_source

# They do not change the data; documents are recorded by their content.
_NO_MATTER = ("workers", "strict", "documents")
# Files and folders, which records keep as digests of their content: only whether one was named is compared.
_FILES = re.compile(r"text\.load|image\.path|modalities\.\w+\.load|tasks\..+")
_SHOWN = 4  # settings in a line


def other_settings(config: Config) -> list[str]:
    """One line for each data set that was not prepared as the configuration says; empty if it does not say how.

    Of a blend one set is enough that was prepared so; otherwise the line is about the most similar one.

    Args:
        config: with `data.prepare`, and the data sets to compare.
    """
    found = differing(config)
    if found is None:
        return []
    path, settings = found
    shown = [f"{key} {has} (the configuration: {wants})" for key, has, wants in settings]
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return [
        f"{path} was prepared with {', '.join(shown[:_SHOWN])}{more}, and is read as it is. Write these values into "
        "the configuration, which runs and exports record, or prepare the data again"
    ]


def differing(config: Config) -> tuple[str, list[tuple[str, str, str]]] | None:
    """The data set that `other_settings` is about, and for each setting its key, the set's value, the configuration's.

    Args:
        config: as for `other_settings`.

    Returns:
        None: there is no such set.
    """
    settings = config.data.prepare
    found = {} if settings is None else {one.path: _differing(Path(one.path), settings) for one in config.data.sources}
    known = {path: differing for path, differing in found.items() if differing is not None}
    if not known or not all(known.values()):
        return None
    path = min(known, key=lambda one: len(known[one]))
    return path, known[path]


def _differing(folder: Path, settings: PrepareConfig) -> list[tuple[str, str, str]] | None:
    """Settings that differ: key, value of the data set, value of the configuration; None: there is no record."""
    record = read_source(folder) or {}
    if not isinstance(recorded := record.get("settings"), dict):
        return None
    default = dict(_flat(PrepareConfig().model_dump(mode="json")))
    has = default | {key: value for key, value in _flat(recorded) if key in default or _is_open(key)}
    wants = dict(_flat(settings.model_dump(mode="json")))
    return [
        (f"data.prepare.{key}", _word(key, has.get(key)), _word(key, wants.get(key)))
        for key in sorted(has.keys() | wants.keys())
        if key not in _NO_MATTER and _word(key, has.get(key)) != _word(key, wants.get(key))
    ]


def _is_open(key: str) -> bool:
    """Whether a key is of a section that is empty, or null, by default."""
    return key.split(".")[0] in ("modalities", "tasks", "canaries", "reader_args") or ".kind_args." in key


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield prefix + key, item


def _word(key: str, value: Any) -> str:
    if _FILES.fullmatch(key):
        return "null" if value is None else "a file"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
