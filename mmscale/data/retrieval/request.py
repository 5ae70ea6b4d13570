"""What `mmscale data retrieve` is asked for, and its checks, which need manifests and headers of files. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.data.arrays import read_array
from mmscale.data.digests import digest_of
from mmscale.data.prepared.manifest import HELD_OUT, TRAIN, read_manifest
from mmscale.errors import DataError, UsageError

MOST_SIMILAR = 0.9


@dataclass(frozen=True, kw_only=True)
class RetrievalRequest:
    """What to look for.

    Attributes:
        columns: neighbours of each document.
        most_similar: largest cosine similarity of a neighbour.
        embeddings: .npy file of the training documents' embeddings; None: they are computed from token ids.
        held_out_embeddings: the same for the held-out documents; None: they get no neighbours if `embeddings` is given.
        dropout: share of a query's tokens that its embedding ignores, if it is computed.
        dimensions: of the computed embedding of a modality.
        seed: of dropout and SVD.
    """

    columns: int = 8
    most_similar: float = MOST_SIMILAR
    embeddings: Path | None = None
    held_out_embeddings: Path | None = None
    dropout: float = 0.2
    dimensions: int = 64
    seed: int = 0

    def described(self) -> dict[str, Any]:
        """The settings that were used, plain JSON."""
        common: dict[str, Any] = {"columns": self.columns, "most_similar": self.most_similar}
        if self.embeddings is None:
            return common | {"dropout": self.dropout, "dimensions": self.dimensions, "seed": self.seed}
        files = {"embeddings": self.embeddings, "held_out_embeddings": self.held_out_embeddings}
        return common | {key: f"{file}, {digest_of(file)}" for key, file in files.items() if file is not None}

    @property
    def files(self) -> dict[str, Path]:
        """The files of embeddings by split."""
        found = {TRAIN: self.embeddings, HELD_OUT: self.held_out_embeddings}
        return {split: file for split, file in found.items() if file is not None}


def check_request(folder: Path, request: RetrievalRequest) -> None:
    """Refuse a data set or files of embeddings that cannot be used, without reading embeddings.

    Args:
        folder: a prepared data set.
        request: what to look for.

    Raises:
        DataError: the data set or a file is missing or damaged, or a file has another number of rows or columns.
        UsageError: embeddings are given for held-out documents only.
    """
    if request.held_out_embeddings is not None and request.embeddings is None:
        raise UsageError(
            "data retrieve: --held-out-embeddings needs --embeddings",
            remedy="give embeddings of the training documents too",
        )
    manifest = read_manifest(folder)
    counts = {split: own.documents for split, own in manifest.splits.items() if own.documents}
    files = {split: file for split, file in request.files.items() if split in counts}
    found = {split: read_embeddings(file, counts[split], split, mapped=True) for split, file in files.items()}
    for split, rows in found.items():
        if rows.shape[1] != found[TRAIN].shape[1]:
            raise DataError(
                f"data: {files[split]} has {rows.shape[1]} columns, {files[TRAIN]} {found[TRAIN].shape[1]}",
                remedy="make both with the same model",
            )


def read_embeddings(file: Path, documents: int, split: str, *, mapped: bool = False) -> NDArray[Any]:
    """Embeddings of a split, a row for each document.

    Args:
        file: .npy of numbers [documents, dimensions].
        documents: of the split.
        split: its name, for messages.
        mapped: only the header is read and checked.

    Raises:
        DataError: the file is missing or damaged, has another shape, or entries that are no numbers.
    """
    try:
        found: NDArray[Any] = read_array(file, mapped=mapped)
    except (OSError, ValueError) as error:
        raise DataError(f"data: {file} cannot be read: {error}", remedy="give a .npy file of numbers") from error
    if found.ndim != 2 or len(found) != documents or not (mapped or np.isfinite(found).all()):
        raise DataError(
            f"data: {file} has the shape {found.shape}, or entries that are no numbers; the split {split!r} has "
            f"{documents} documents",
            remedy="give one row for each document, in the order of the data set",
        )
    return found
