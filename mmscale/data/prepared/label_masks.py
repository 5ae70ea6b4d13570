"""Masks of single labels, for parts with chat documents: `<prefix>.mask` and `<prefix>.labels.npy`.

The mask has a bit for each token of the part, in the order of its .bin file: 1, the token is trained on as a label. The
table has the number of such labels per document and modality, which packing needs without reading tokens.
mask_writer.py makes both. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmscale.data.arrays import read_array
from mmscale.data.prepared.manifest import FIRST_MODALITY, Part
from mmscale.errors import DataError

MASK, LABELS = ".mask", ".labels.npy"
_AGAIN = "run `mmscale data prepare` again: only damaged parts are made again after you delete them"


def map_label_counts(folder: Path, part: Part) -> NDArray[Any]:
    """Trained labels of each document of a masked part, [documents, modalities], mapped instead of read.

    Raises:
        DataError: the file is missing or does not fit the part.
    """
    file = folder / f"{part.prefix}{LABELS}"
    try:
        found = read_array(file, mapped=True)
    except (OSError, ValueError) as error:
        raise DataError(f"data: {file} cannot be read: {error}", remedy=_AGAIN) from error
    if found.shape != (part.documents, len(part.tokens)) or found.dtype.kind not in "iu":
        raise DataError(f"data: {file} does not fit its part of {part.documents} documents", remedy=_AGAIN)
    return found


def label_counts(table: NDArray[np.int64], listed: NDArray[Any] | None = None) -> NDArray[np.int64]:
    """Labels of each document that are trained on, int64 [documents, modalities].

    Args:
        table: rows of a part's table.
        listed: the same rows of `map_label_counts`; None: the part has no masks.
    """
    if listed is not None:
        return np.asarray(listed, np.int64)
    labels = table[:, :-1].astype(np.int64)
    labels[:, FIRST_MODALITY] -= 1  # a document's first token is never a label
    return labels * (table[:, -1:].astype(np.int64) >> np.arange(labels.shape[1]) & 1)


def read_mask(folder: Path, part: Part, spans: Sequence[tuple[int, int]]) -> list[NDArray[np.bool_]]:
    """Masks of some documents of a masked part, bool [tokens] each.

    Args:
        folder: the data set.
        part: the part.
        spans: where each begins in the .bin file, and its length [tokens].

    Raises:
        DataError: the file is missing or too short.
    """
    file = folder / f"{part.prefix}{MASK}"
    found = []
    try:
        with file.open("rb") as stream:
            for start, length in spans:
                stream.seek(start // 8)
                bits = np.frombuffer(stream.read((start + length + 7) // 8 - start // 8), np.uint8)
                mask = np.unpackbits(bits)[start % 8 :][:length].astype(bool)
                if len(mask) < length:
                    raise DataError(f"data: {file} is shorter than its part", remedy=_AGAIN)
                found.append(mask)
    except OSError as error:
        raise DataError(f"data: {file} cannot be read: {error.strerror}", remedy=_AGAIN) from error
    return found
