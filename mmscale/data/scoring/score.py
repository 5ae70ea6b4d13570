"""`mmscale data score` without a trained model: by rules, by a classifier of texts, or from a file of scores.

mmscale.inference.score_documents has the scores by a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.data.arrays import read_array
from mmscale.data.dedup.compared import ContentReader, DocumentRange, slices
from mmscale.data.prepared.manifest import TRAIN, parts_of, read_manifest
from mmscale.data.process_pool import map_in_processes
from mmscale.data.progress import Reporter
from mmscale.data.scoring.classifier import TextClassifier, read_classifier
from mmscale.data.scoring.line_rules import quality
from mmscale.data.scoring.stored import check_names, write_scores
from mmscale.errors import DataError, UsageError

RULES, CLASSIFIER = "rules", "classifier"


def score(folder: Path, by: str, *, name: str | None = None, workers: int = 1, reporter: Reporter) -> dict[str, Any]:
    """Write a score of each training document to scores/NAME.npy.

    Args:
        folder: a prepared data set.
        by: "rules"; "classifier:FILE"; or a file of scores in the order of the documents: .npy, or .parquet with a
            column "score".
        name: of the score; default: "rules", "classifier", or the file's.
        workers: processes.
        reporter: shows the progress.

    Raises:
        DataError: the data set or the file is damaged, or has another number of documents.
        UsageError: there is no such scorer, or the name is invalid.
    """
    kind, _, argument = by.partition(":")
    if by == RULES or (kind == CLASSIFIER and argument):
        name = name or kind
        check_names(folder, [name])
        scorer: _Scorer = quality if by == RULES else read_classifier(Path(argument))
        found: NDArray[Any] = by_text(folder, scorer, workers=workers, reporter=reporter)
    elif Path(by).suffix in _FILES:
        name = name or Path(by).stem
        check_names(folder, [name])
        found = _read_scores(Path(by))
    else:
        raise UsageError(
            f"data score: there is no scorer {by!r}",
            remedy="use --by rules, classifier:FILE, perplexity:RUN, memorised:RUN, influence:RUN, FILE.npy or "
            "FILE.parquet",
        )
    return write_scores(folder, {name: found}, made={"by": by})


_Scorer = Callable[[str], float] | TextClassifier


def by_text(folder: Path, scorer: _Scorer, *, workers: int, reporter: Reporter) -> NDArray[np.float32]:
    """A number for the text of each training document, float32 [D].

    Args:
        folder: a prepared data set.
        scorer: computes the number; it is sent to processes.
        workers: processes.
        reporter: shows the progress.

    Raises:
        DataError: the data set is damaged.
    """
    parts = parts_of(folder, read_manifest(folder), TRAIN)
    pieces, found = slices(parts), []
    with reporter.bar("documents", sum(part.documents for part in parts)) as advance:
        work = partial(_score_slice, folder, scorer)
        for piece, own in zip(pieces, map_in_processes(work, pieces, workers), strict=True):
            found.append(own)
            advance(piece.first + len(own))
    return np.concatenate(found)


def _score_slice(folder: Path, scorer: _Scorer, piece: DocumentRange) -> NDArray[np.float32]:
    reader = ContentReader(folder, split=TRAIN, draw=False)
    texts = (reader.text(piece, place) for place in range(piece.stop - piece.start))
    return np.fromiter((scorer(text) for text in texts), np.float32, piece.stop - piece.start)


def _read_npy(file: Path) -> NDArray[Any]:
    return read_array(file)


def _read_parquet(file: Path) -> NDArray[Any]:
    import pyarrow.parquet as pq

    return np.asarray(pq.read_table(file, columns=["score"])["score"].to_numpy(), np.float64)


_FILES: Mapping[str, Callable[[Path], NDArray[Any]]] = {".npy": _read_npy, ".parquet": _read_parquet}


def _read_scores(file: Path) -> NDArray[np.float64]:
    try:
        return np.asarray(_FILES[file.suffix](file), np.float64)
    except ModuleNotFoundError as error:
        raise DataError(f"data: {file} needs pyarrow", remedy="pip install mmscale[data]") from error
    except Exception as error:  # pyarrow raises its own kinds
        raise DataError(f"data: {file} cannot be read: {error}", remedy='give a column "score" of numbers') from error
