"""Totals of the per-document tables of a split: the longest document, trained labels of each modality.

The tables of a small split are read and checked at every call. Those of a large one are read and checked once, and the
result is stored next to the data. No torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmscale import bounded
from mmscale.data.prepared.label_masks import label_counts, map_label_counts
from mmscale.data.prepared.manifest import Manifest, Part, checked_table, parts_of
from mmscale.errors import DataError
from mmscale.runtime.atomic_files import write_atomic

log = logging.getLogger(__name__)

LARGE = 1 << 20  # a split with more documents is not read at each start
_CACHE = ".cache"  # inside the data set
_THREADS = 8  # sums of numpy, which run in parallel


@dataclass(frozen=True)
class TableFacts:
    """Facts of a split's tables.

    Attributes:
        longest: tokens of the longest document.
        where: number of that document in its split.
        labels: labels of each modality that are trained on, over all documents.
    """

    longest: int
    where: int
    labels: tuple[int, ...]


def table_facts(folder: Path, manifest: Manifest, split: str, *, cache: Path | None = None) -> TableFacts:
    """Facts of a split.

    Args:
        folder: the data set.
        manifest: its manifest.
        split: one that has documents.
        cache: folder for facts of large splits; default: .cache inside the data set.

    Raises:
        DataError: there is no such split, or a table is missing or damaged.
    """
    parts = parts_of(folder, manifest, split)
    if sum(part.documents for part in parts) <= LARGE:
        return _read(folder, manifest, parts)
    file = (cache or folder / _CACHE) / f"facts-{_key(folder, manifest, split, parts)}.json"
    found = _kept(file, len(manifest.modalities))
    if found is None:
        found = _read(folder, manifest, parts)
        _keep(file, found)
    return found


def keep_facts(folder: Path, manifest: Manifest) -> None:
    """Read the tables of large splits now, so that starts of runs need not."""
    for split, own in manifest.splits.items():
        if own.documents > LARGE:
            table_facts(folder, manifest, split)


def longer_than(folder: Path, manifest: Manifest, split: str, *, tokens: int) -> int:
    """How many documents of a split have more tokens than this."""
    parts = parts_of(folder, manifest, split)
    return sum(int((_lengths(checked_table(folder, part, manifest.modalities)) > tokens).sum()) for part in parts)


def _read(folder: Path, manifest: Manifest, parts: tuple[Part, ...]) -> TableFacts:
    with ThreadPoolExecutor(min(_THREADS, len(parts))) as threads:
        found = list(_in_order(threads, folder, manifest, parts))
    before = np.cumsum([0, *(part.documents for part in parts)])
    first = max(range(len(found)), key=lambda number: found[number].longest)
    return TableFacts(
        longest=found[first].longest,
        where=int(before[first]) + found[first].where,
        labels=tuple(map(sum, zip(*(one.labels for one in found), strict=True))),
    )


def _in_order(
    threads: ThreadPoolExecutor, folder: Path, manifest: Manifest, parts: tuple[Part, ...]
) -> Iterator[TableFacts]:
    """Facts of each part; after a failure no further part is read."""
    try:
        yield from threads.map(partial(_of_part, folder, manifest), parts)
    except DataError:
        threads.shutdown(cancel_futures=True)
        raise


def _of_part(folder: Path, manifest: Manifest, part: Part) -> TableFacts:
    table = checked_table(folder, part, manifest.modalities)
    lengths = _lengths(table)
    where = int(lengths.argmax())
    labels = label_counts(table, map_label_counts(folder, part) if part.masked else None)
    return TableFacts(int(lengths[where]), where, tuple(labels.sum(axis=0).tolist()))


def _lengths(table: np.ndarray) -> np.ndarray:
    lengths: np.ndarray = table[:, :-1].sum(axis=1)
    return lengths


def _key(folder: Path, manifest: Manifest, split: str, parts: tuple[Part, ...]) -> str:
    """Changes when the tables do. For data of other programs it also changes when they are written again."""
    listing: list[Any] = [split, manifest.vocabulary, manifest.source, [part.listing for part in parts]]
    if not manifest.source:
        try:
            listing += [(folder / f"{part.prefix}.meta.npy").stat().st_mtime_ns for part in parts]
        except OSError as error:
            raise DataError(
                f"data: {error.filename} cannot be read: {error.strerror}", remedy="run `mmscale data prepare` again"
            ) from error
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()[:16]


def _kept(file: Path, modalities: int) -> TableFacts | None:
    try:
        content = bounded.read_object(file)
        found = TableFacts(int(content["longest"]), int(content["where"]), tuple(map(int, content["labels"])))
    except FileNotFoundError:
        return None
    except (OSError, *bounded.BAD_CONTENT) as error:
        log.warning("data: %s cannot be read and is made again: %s", file, error)
        return None
    return found if len(found.labels) == modalities else None


def _keep(file: Path, found: TableFacts) -> None:
    """Write atomically; a folder that cannot be written to is not an error."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(asdict(found)))
    except OSError as error:
        log.warning("data: %s cannot be written: the tables are read again at the next start: %s", file, error)
