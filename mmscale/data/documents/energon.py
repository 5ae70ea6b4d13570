"""Folders of WebDataset tars that Megatron-Energon has indexed (`energon prepare`): their shards and splits.

The package is not needed. Samples are read like those of any archive; energon's field mapping is not applied.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmscale import bounded
from mmscale.config.document import read_file
from mmscale.data.documents.schema import SplitName
from mmscale.errors import ConfigError, DataError

META = ".nv-meta"
_SPLITS: dict[str, SplitName] = {"train": "train", "val": "validation", "validation": "validation"}  # test is left out
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


@functools.lru_cache(maxsize=16)
def shards_of(folder: Path) -> dict[str, tuple[int, SplitName]]:
    """Samples and split of each shard for training and validation, by its name.

    Raises:
        DataError: the index is missing or damaged.
    """
    try:
        counts = {str(name): int(count) for name, count in _read(folder / META / ".info")["shard_counts"].items()}
        parts = _read(folder / META / "split")["split_parts"]
        listed = {name: split for word, split in _SPLITS.items() for name in _names(parts.get(word) or ())}
        return {name: (counts[name], split) for name, split in listed.items()}
    except (OSError, ConfigError, *bounded.BAD_CONTENT) as error:
        why = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"documents: the index of {folder} cannot be read: {why}", remedy="run `energon prepare` again"
        ) from error


def _read(stem: Path) -> Mapping[str, Any]:
    """A file of the index: JSON in newer versions, YAML in older ones."""
    file = stem.with_name(stem.name + ".json")
    if file.is_file():
        return bounded.read_object(file)
    return read_file(stem.with_name(stem.name + ".yaml")).data


def _names(patterns: Any) -> Iterator[str]:
    """Names of shards, with `{000..019}` expanded."""
    for pattern in patterns:
        ranges = [_numbers(*found) for found in _BRACES.findall(pattern)]
        form = _BRACES.sub("{}", pattern)
        yield from (form.format(*numbers) for numbers in itertools.product(*ranges))


def _numbers(first: str, last: str) -> list[str]:
    if int(last) - int(first) > 1_000_000:
        raise ValueError(f"{{{first}..{last}}} are too many shards")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


def facts_of(file: object) -> tuple[int, SplitName] | None:
    """Samples and split of a shard of such a folder; None: the file is not in one."""
    if not isinstance(file, Path):
        return None
    folder = next((one for one in file.parents if (one / META).is_dir()), None)
    return None if folder is None else shards_of(folder).get(file.relative_to(folder).as_posix())
