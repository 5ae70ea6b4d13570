"""Counts documents whose id another document has, in bounded memory.

Every part keeps hashes of its ids in done/<part>.ids.npy: all of them in small parts, otherwise the smallest ones. The
parts of a data set keep the same range of hashes in common, so equal ids of different parts are found, and a share of
all ids is enough for an estimate.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmscale.runtime.atomic_files import write_atomic

SUFFIX = ".ids.npy"
KEPT = 8192  # different hashes of a part: 128 KiB
_LARGEST = np.iinfo(np.uint64).max

Hashes = NDArray[np.uint64]


def keep_ids(file: Path, ids: Sequence[str], *, kept: int = KEPT) -> None:
    """Write the smallest hashes of a part's ids, and how many documents have each.

    Args:
        file: to write, atomically: uint64 [hashes, 2].
        ids: of all its documents.
        kept: different hashes at most.
    """
    hashes = np.fromiter((_hash(one) for one in ids), dtype=np.uint64, count=len(ids))
    found, counts = np.unique(hashes, return_counts=True)
    content = io.BytesIO()
    np.save(content, np.stack([found, counts.astype(np.uint64)], axis=1)[:kept])
    write_atomic(file, content.getvalue())


def repeated_ids(files: Iterable[Path], *, documents: int, kept: int = KEPT) -> tuple[int, int] | None:
    """How many documents have the id of an earlier one, and the number of documents.

    Exact if the parts have kept all of their ids, otherwise an estimate.

    Args:
        files: of every part, from `keep_ids`.
        documents: number of documents in all parts.
        kept: as in `keep_ids`.

    Returns:
        None if a file is missing or damaged, as in data sets of earlier versions.
    """
    tables, limit = [], _LARGEST
    for file in files:
        try:
            table = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        if table.ndim != 2 or table.shape[1] != 2 or table.dtype != np.uint64:
            return None
        if len(table) >= kept:
            limit = min(limit, table[-1, 0])
        tables.append(table)
    if not tables:
        return None
    table = np.concatenate(tables)
    table = table[table[:, 0] <= limit]
    seen = int(table[:, 1].sum())
    if not seen:
        return None
    return round((seen - len(np.unique(table[:, 0]))) / seen * documents), documents


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
