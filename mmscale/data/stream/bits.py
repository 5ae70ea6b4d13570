"""Bits per byte of held-out text: a loss that does not depend on the text tokenizer, for comparing vocabularies.

The measure of BLT (arXiv 2412.09871) and MEGABYTE (arXiv 2305.07185). `data prepare` counts the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from mmscale.config.derived import BITS
from mmscale.data.stream.mixture import Mixture


def bits_per_byte(losses: Mapping[str, float], data: Mixture, *, text: str) -> dict[str, float]:
    """The loss of text in bits for each byte, special tokens included.

    A pass that ends after some batches is assumed to have as many labels per byte as the whole set.

    Args:
        losses: `loss/<modality>` [nats per label], of a pass over `data`.
        data: the pass.
        text: name of the first modality.

    Returns:
        `bits_per_byte/<text>`; empty if bytes were not counted (data sets of older versions, Megatron corpora, text
        given as tokens) or there are none.
    """
    loss = losses.get(f"loss/{text}")
    counts = [source.text for source in data.sources]
    if loss is None or any(count is None for count in counts):
        return {}
    size, labels = (sum(column) for column in zip(*(count for count in counts if count is not None), strict=True))
    return {f"{BITS}{text}": loss / math.log(2) * labels / size} if size else {}
