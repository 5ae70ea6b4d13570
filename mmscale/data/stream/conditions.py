"""Which labels follow an item of another modality, for losses of one modality given another.

MoMa (arXiv 2407.21770, tables 3 and 4) reports perplexities of a caption given its image and of an image given its
caption. Here a label counts for `text_given_image` if it is a text token after a token of an image in the same
document. Special tokens are neither labels nor conditions: `</s>` after an image is no caption, and `<s>` no text. Of a
document that is longer than a sequence, each piece is a document. NumPy on the host.

b sequences of a micro-batch, s tokens of a sequence, K modalities.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mmscale.data.stream.micro_batch import MicroBatch
from mmscale.data.vocab import NO_MODALITY, Vocabulary


def conditional_names(names: Sequence[str]) -> list[str]:
    """Names of all ordered pairs of modalities, in the order of the rows of `conditional_labels` and of modalities."""
    count = len(names)
    return [f"{own}_given_{names[(m + j) % count]}" for j in range(1, count) for m, own in enumerate(names)]


def conditional_labels(batch: MicroBatch, vocabulary: Vocabulary) -> NDArray[np.float32]:
    """1 where a label counts, float32 [K - 1, b, s].

    Row j - 1 is about a label of modality m given modality (m + j) % K. Whether labels are trained on does not matter.

    Args:
        batch: a micro-batch with whole sequences.
        vocabulary: gives modalities and special tokens.
    """
    count = len(vocabulary.names)
    of_label = _content(batch.labels, vocabulary)
    before = _seen(_content(batch.tokens, vocabulary), batch.document_ids, count=count)
    given = [
        np.take_along_axis(before, ((of_label.astype(np.int64) + j) % count)[None], axis=0)[0] for j in range(1, count)
    ]
    found = np.stack(given) if given else np.zeros((0, *of_label.shape), bool)
    return (found & (of_label != NO_MODALITY)).astype(np.float32)


def _content(ids: NDArray[np.int64], vocabulary: Vocabulary) -> NDArray[np.int8]:
    """Modality of each id, NO_MODALITY for special tokens [b, s]."""
    return np.where(ids < len(vocabulary.specials), NO_MODALITY, vocabulary.modality_of(ids)).astype(np.int8)


def _seen(content: NDArray[np.int8], documents: NDArray[np.int32], *, count: int) -> NDArray[np.bool_]:
    """Whether a document has had a token of each modality, up to and including each place [K, b, s]."""
    own = content[None] == np.arange(count)[:, None, None]
    totals = np.cumsum(own, axis=-1)
    begins = np.ones(documents.shape, bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = np.maximum.accumulate(np.where(begins, np.arange(documents.shape[1]), 0), axis=1)
    before_document = np.take_along_axis(totals - own, np.broadcast_to(starts, own.shape), axis=-1)
    found: NDArray[np.bool_] = totals > before_document
    return found
