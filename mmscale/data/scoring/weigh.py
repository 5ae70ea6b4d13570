"""`mmscale data score` and `data select`: scores next to a data set, and document weights computed from them.

D documents of the training split.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale import bounded
from mmscale.data.arrays import read_array
from mmscale.data.dedup.compared import ContentReader, slices
from mmscale.data.dedup.find import in_processes
from mmscale.data.prepared.folder_lock import held
from mmscale.data.prepared.identity import identity_of
from mmscale.data.prepared.manifest import TRAIN, Manifest, Part, map_table, parts_of, read_manifest
from mmscale.data.prepared.selection import (
    MOST_WEIGHT,
    SCORES,
    DocumentWeights,
    read_selection,
    remove_layer,
    write_layer,
)
from mmscale.data.progress import Reporter
from mmscale.data.scoring import choose
from mmscale.data.scoring.line_rules import quality
from mmscale.errors import DataError, UsageError
from mmscale.runtime.atomic_files import write_atomic

LAYER = "select"


def score(folder: Path, by: str, *, name: str | None = None, workers: int = 1, reporter: Reporter) -> dict[str, Any]:
    """Write a score of each training document to scores/NAME.npy.

    Args:
        folder: a prepared data set.
        by: "rules", or a file of scores in the order of the documents: .npy, or .parquet with a column "score".
        name: of the score; default: "rules", or the file's.
        workers: processes.
        reporter: shows the progress.

    Raises:
        DataError: the data set or the file is damaged, or has another number of documents.
        UsageError: there is no such scorer, or the name is invalid.
    """
    manifest = read_manifest(folder)
    parts = parts_of(folder, manifest, TRAIN)
    documents = sum(part.documents for part in parts)
    name = name or ("rules" if by == "rules" else Path(by).stem)
    if not name.isidentifier() or name in _columns(folder, manifest, parts):
        raise UsageError(f"data score: {name!r} cannot be the name of a score", remedy="choose another --name")
    if by == "rules":
        found: NDArray[Any] = _by_rules(folder, parts, workers, reporter)
    elif Path(by).suffix in _FILES:
        found = _read_scores(Path(by))
    else:
        raise UsageError(f"data score: there is no scorer {by!r}", remedy="use --by rules, FILE.npy or FILE.parquet")
    if found.shape != (documents,) or not np.isfinite(found).all():
        raise DataError(
            f"data: {by} has {found.size} scores, or some that are no numbers; {folder} has {documents} documents",
            remedy="give one number for each training document, in the order of the data set",
        )
    (folder / SCORES).mkdir(exist_ok=True)
    content = io.BytesIO()
    np.save(content, found.astype(np.float32))
    with held(folder):
        write_atomic(folder / SCORES / f"{name}.npy", content.getvalue())
        write_atomic(folder / SCORES / f"{name}.of", identity_of(folder, manifest).encode())
    shown = np.quantile(found, [0.0, 0.25, 0.5, 0.75, 1.0]).round(4).tolist()
    return {
        "folder": str(folder),
        "name": name,
        "documents": documents,
        "quantiles": shown,
        "mean": float(found.mean()),
    }


def _by_rules(folder: Path, parts: tuple[Part, ...], workers: int, reporter: Reporter) -> NDArray[np.float32]:
    pieces = slices(parts)
    found = []
    with reporter.bar("documents", sum(part.documents for part in parts)) as advance:
        for piece, own in zip(pieces, in_processes(_Rules(folder), pieces, workers), strict=True):
            found.append(own)
            advance(piece.first + len(own))
    return np.concatenate(found)


class _Rules:
    """Computes the scores of consecutive documents; a class, so that it can be sent to processes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, piece: Any) -> NDArray[np.float32]:
        reader = ContentReader(self._folder, split=TRAIN, draw=False)
        texts = (reader.text(piece, place) for place in range(piece.stop - piece.start))
        return np.fromiter((quality(text) for text in texts), np.float32, piece.stop - piece.start)


def _read_npy(file: Path) -> NDArray[Any]:
    return read_array(file)


def _read_parquet(file: Path) -> NDArray[Any]:
    import pyarrow.parquet as pq

    return np.asarray(pq.read_table(file, columns=["score"])["score"].to_numpy(), np.float64)


_FILES: dict[str, Callable[[Path], NDArray[Any]]] = {".npy": _read_npy, ".parquet": _read_parquet}


def _read_scores(file: Path) -> NDArray[np.float64]:
    try:
        return np.asarray(_FILES[file.suffix](file), np.float64)
    except ModuleNotFoundError as error:
        raise DataError(f"data: {file} needs pyarrow", remedy="pip install mmscale[data]") from error
    except Exception as error:  # pyarrow raises its own kinds
        raise DataError(f"data: {file} cannot be read: {error}", remedy='give a column "score" of numbers') from error


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
        columns = _columns(folder, manifest, parts) | _scores(folder, manifest, parts)
        found = choose.evaluate(expression if expression is not None else str(by), columns)
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


def _columns(folder: Path, manifest: Manifest, parts: tuple[Part, ...]) -> dict[str, NDArray[np.float64]]:
    """Tokens of each document, and those of each modality."""
    table = np.concatenate([map_table(folder, part)[:, :-1] for part in parts]).astype(np.float64)
    own = {f"{name}_tokens": table[:, number] for number, name in enumerate(manifest.modalities)}
    return own | {"tokens": table.sum(axis=1)}


def _scores(folder: Path, manifest: Manifest, parts: tuple[Part, ...]) -> dict[str, NDArray[np.float64]]:
    """All scores that exist for these documents.

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
