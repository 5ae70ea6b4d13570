"""Makes the masks of single labels of a part; label_masks.py describes and reads them."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

from mmscale.data.prepared.encode import Encoded
from mmscale.data.prepared.label_masks import LABELS, MASK
from mmscale.data.vocab import Vocabulary


class MaskWriter:
    """Collects the masks of a part's documents in their order, one bit per token.

    Args:
        vocabulary: gives modalities.

    Attributes:
        needed: whether a document needs a mask of its own; otherwise `loss` in the part's table says everything.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.needed = False
        self._masks: list[tuple[int, NDArray[np.uint8] | None]] = []  # tokens, bits; None: all but the first
        self._labels: list[NDArray[np.int64]] = []

    def add(self, encoded: Encoded) -> None:
        """Append a document."""
        self.needed |= encoded.trained is not None
        names = len(self.vocabulary.names)
        if encoded.trained is None and encoded.loss == (1 << names) - 1:
            bits = None
        else:
            bits = np.packbits(_mask_of(encoded, self.vocabulary))
        self._masks.append((len(encoded.ids), bits))
        self._labels.append(encoded.labels(self.vocabulary))

    def files(self) -> dict[str, bytes]:
        """The content of the part's files by their suffixes; none if no document needs them."""
        if not self.needed:
            return {}
        table = io.BytesIO()
        np.save(table, np.stack(self._labels))
        masks = [_unpacked(*one) for one in self._masks]
        return {MASK: np.packbits(np.concatenate(masks)).tobytes(), LABELS: table.getvalue()}


def _mask_of(encoded: Encoded, vocabulary: Vocabulary) -> NDArray[np.bool_]:
    if encoded.trained is not None:
        return encoded.trained
    mask = (encoded.loss >> vocabulary.modality_of(encoded.ids).astype(np.int64) & 1).astype(bool)
    mask[0] = False
    return mask


def _unpacked(tokens: int, bits: NDArray[np.uint8] | None) -> NDArray[np.bool_]:
    if bits is not None:
        return np.unpackbits(bits, count=tokens).astype(bool)
    mask = np.ones(tokens, bool)
    mask[0] = False
    return mask
