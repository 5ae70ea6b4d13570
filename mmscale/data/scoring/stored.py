"""Scores next to a prepared data set: a number for each training document, in scores/NAME.npy.

NAME.of has the identity of the documents, NAME.json what made the score, for people. D documents of the training split.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale import bounded
from mmscale.data.arrays import read_array
from mmscale.data.prepared.folder_lock import held, write_error
from mmscale.data.prepared.identity import identity_of
from mmscale.data.prepared.manifest import TRAIN, Manifest, Part, map_table, parts_of, read_manifest
from mmscale.data.prepared.selection import SCORES
from mmscale.errors import DataError, UsageError
from mmscale.runtime.atomic_files import write_atomic

_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


def columns(folder: Path, manifest: Manifest, parts: tuple[Part, ...]) -> dict[str, NDArray[np.float64]]:
    """What expressions may use besides scores: `tokens` and `<modality>_tokens` of each document, float64 [n]."""
    table = np.concatenate([map_table(folder, part)[:, :-1] for part in parts]).astype(np.float64)
    own = {f"{name}_tokens": table[:, number] for number, name in enumerate(manifest.modalities)}
    return own | {"tokens": table.sum(axis=1)}


def check_names(folder: Path, names: Iterable[str]) -> None:
    """Refuse names that an expression could not use, before anything is computed.

    Raises:
        DataError: the data set is missing or damaged.
        UsageError: a name is invalid or taken.
    """
    modalities = read_manifest(folder).modalities
    taken = {"tokens", *(f"{name}_tokens" for name in modalities)}
    for name in names:
        if not name.isidentifier() or name in taken:
            raise UsageError(f"data score: {name!r} cannot be the name of a score", remedy="choose another --name")


def write_scores(
    folder: Path, scores: Mapping[str, NDArray[np.floating]], *, made: Mapping[str, Any], lacking: bool = False
) -> dict[str, Any]:
    """Write scores of the training documents, each file atomically.

    Args:
        folder: the data set.
        scores: by name, [D] each.
        made: what made them, plain JSON.
        lacking: whether documents may have no score, which is NaN.

    Returns:
        The first score's name and quantiles and the numbers of documents, ready for JSON.

    Raises:
        DataError: the data set is damaged, a score has another number of documents or is not a number, or the disk is
            full.
        UsageError: a name is invalid or taken.
    """
    check_names(folder, scores)
    manifest = read_manifest(folder)
    documents = sum(part.documents for part in parts_of(folder, manifest, TRAIN))
    for values in scores.values():
        if values.shape != (documents,) or not (np.isfinite(values) | (lacking & np.isnan(values))).all():
            raise DataError(
                f"data: {made['by']} has {values.size} scores, or some that are no numbers; {folder} has {documents} "
                "documents",
                remedy="give one number for each training document, in the order of the data set",
            )
    of, described = identity_of(folder, manifest), json.dumps(dict(made), indent=1) + "\n"
    try:
        (folder / SCORES).mkdir(exist_ok=True)
        with held(folder):
            for name, values in scores.items():
                content = io.BytesIO()
                np.save(content, values.astype(np.float32))
                write_atomic(folder / SCORES / f"{name}.npy", content.getvalue())
                write_atomic(folder / SCORES / f"{name}.of", of.encode())
                write_atomic(folder / SCORES / f"{name}.json", described.encode())
    except OSError as error:
        raise write_error(error, folder / SCORES) from error
    name, values = next(iter(scores.items()))
    finite = values[np.isfinite(values)]
    return {
        "folder": str(folder),
        "name": name,
        "documents": documents,
        "scored": len(finite),
        "quantiles": np.quantile(finite, _QUANTILES).round(4).tolist() if len(finite) else [],
        "mean": float(finite.mean()) if len(finite) else None,
        "names": list(scores),
    }


def read_scores(folder: Path, manifest: Manifest, parts: tuple[Part, ...]) -> dict[str, NDArray[np.float64]]:
    """All scores that exist for these documents by name, float64 [n]; NaN: the document has none.

    Args:
        folder: the data set.
        manifest: of it.
        parts: of its training split; they have n documents.

    Raises:
        DataError: one is damaged, or of other documents.
    """
    of, documents = identity_of(folder, manifest), sum(part.documents for part in parts)
    found = {}
    for file in sorted((folder / SCORES).glob("*.npy")):
        try:
            made_for = bounded.read_text(file.with_suffix(".of"))
            values = read_array(file)
        except (OSError, ValueError) as error:
            raise DataError(f"data: {file} cannot be read: {error}", remedy="score again, or remove it") from error
        if made_for.strip() != of or values.shape != (documents,):
            raise DataError(f"data: {file} was made for other documents", remedy="score again, or remove it")
        found[file.stem] = values.astype(np.float64)
    return found
