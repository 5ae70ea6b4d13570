"""`mmscale data select`: document weights computed from scores, expressions and embeddings.

D documents of the training split.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.data.arrays import read_array
from mmscale.data.prepared.identity import identity_of
from mmscale.data.prepared.manifest import TRAIN, parts_of, read_manifest
from mmscale.data.prepared.selection import MOST_WEIGHT, DocumentWeights, read_selection, remove_layer, write_layer
from mmscale.data.scoring import choose
from mmscale.data.scoring.stored import columns, read_scores
from mmscale.errors import DataError, UsageError

LAYER = "select"


def select(
    folder: Path,
    *,
    expression: str | None = None,
    by: str | None = None,
    top: float | None = None,
    temperature: float = 0.0,
    embeddings: Path | None = None,
    clusters: int = 1000,
    similar: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Write weights of the training documents; exactly one of expression, by and embeddings must be given.

    Args:
        folder: a prepared data set.
        expression: of scores, tokens and tokens of modalities: a condition, or how often an epoch reads a document.
        by: name of a score (or an expression) of which the best are kept.
        top: share of the documents that is kept, of those that no other layer excludes.
        temperature: as for `choose.top`.
        embeddings: .npy [D, E], for D4.
        clusters: as for `choose.d4`.
        similar: as for `choose.d4`.
        seed: of the random choices.

    Raises:
        DataError: the data set, a score or the embeddings are damaged or of other documents, or nothing would be left.
        UsageError: an expression is invalid, or none of the three arguments is given.
    """
    manifest = read_manifest(folder)
    parts = parts_of(folder, manifest, TRAIN)
    given = [expression is not None, by is not None, embeddings is not None]
    if sum(given) != 1 or (expression is None and top is None):
        raise UsageError(
            "data select: nothing says which documents",
            remedy="give --expr EXPRESSION; or --by SCORE --top SHARE; or --d4 EMBEDDINGS.npy --top SHARE",
        )
    of = identity_of(folder, manifest)
    made: dict[str, Any]
    if embeddings is not None:
        x = _read_embeddings(embeddings, sum(part.documents for part in parts))
        assert top is not None
        kept = _kept_by_others(folder, of, len(x))
        weights: NDArray[Any] = np.zeros(len(x), np.bool_)
        weights[kept] = choose.d4(x[kept], share=top, clusters=clusters, similar=similar, seed=seed)
        made = {"d4": str(embeddings), "top": top, "clusters": clusters, "similar": similar, "seed": seed}
    else:
        values = columns(folder, manifest, parts) | read_scores(folder, manifest, parts)
        found = choose.evaluate(expression if expression is not None else str(by), values)
        if by is not None:
            assert top is not None
            kept = _kept_by_others(folder, of, len(found))
            weights = np.zeros(len(found), np.bool_)
            weights[kept] = choose.top(found[kept], share=top, temperature=temperature, seed=seed)
            made = {"by": by, "top": top, "temperature": temperature, "seed": seed}
        else:
            if not ((found >= 0.0) & (found <= MOST_WEIGHT)).all():
                raise UsageError(
                    f"--expr: {expression!r} is from {found.min():.4g} to {found.max():.4g}; weights are from 0 to "
                    f"{MOST_WEIGHT:g}",
                    remedy="give a condition, or use min(max(..., 0), 4)",
                )
            weights, made = found.astype(np.float32), {"expr": expression}
    selection = write_layer(folder, manifest, parts, weights, name=LAYER, of=of, made=made)
    own = {"kept": int((weights > 0).sum()), "weight": float(weights.sum())}
    return {"folder": str(folder), "documents": len(weights)} | own | made | {"selection": selection.identity}


def _kept_by_others(folder: Path, of: str, documents: int) -> NDArray[np.bool_]:
    """Documents that no other layer excludes, bool [D]; shares are relative to these."""
    found = read_selection(folder)
    others = [] if found is None or found.of != of else [one.key for one in found.layers if one.name != LAYER]
    if not others:
        return np.ones(documents, np.bool_)
    kept: NDArray[np.bool_] = DocumentWeights(folder, "+".join(others), documents=documents).weights(slice(None)) > 0.0
    return kept


def undo(folder: Path) -> bool:
    """Remove the weights; False: there were none.

    Raises:
        DataError: the data set or its selection is missing or damaged.
    """
    manifest = read_manifest(folder)
    return remove_layer(
        folder, manifest, parts_of(folder, manifest, TRAIN), name=LAYER, of=identity_of(folder, manifest)
    )


def _read_embeddings(file: Path, documents: int) -> NDArray[np.floating]:
    try:
        found = read_array(file, mapped=True)
    except (OSError, ValueError) as error:
        raise DataError(
            f"data: {file} cannot be read: {error}", remedy="give a .npy of float [documents, E]"
        ) from error
    if found.ndim != 2 or len(found) != documents or not np.isfinite(found).all():
        raise DataError(
            f"data: {file} has shape {found.shape}, not finite numbers for each of {documents} documents",
            remedy="give one row for each training document, in the order of the data set",
        )
    return found
