"""Bits per byte of held-out text: a loss that does not depend on the text tokenizer, so that vocabularies compare.

The measure of BLT (arXiv 2412.09871) and MEGABYTE (arXiv 2305.07185). `data prepare` counts the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from mmscale.config.derived import BITS
from mmscale.data.stream.mixture import Mixture


def bits_per_byte(losses: Mapping[str, float], data: Mixture, *, text: str) -> dict[str, float]:
    """The loss of text in bits for each byte of it, special tokens included.

    A pass that is cut off after some batches is taken to have as many labels for each byte as the whole set.

    Args:
        losses: `loss/<modality>` [nats per label], of a pass over `data`.
        data: the pass.
        text: name of the first modality.

    Returns:
        `bits_per_byte/<text>`; nothing if bytes were not counted, or there are none: data sets of older versions,
        Megatron corpora, text that came as tokens.
    """
    loss = losses.get(f"loss/{text}")
    counts = [source.text for source in data.sources]
    if loss is None or any(count is None for count in counts):
        return {}
    size, labels = (sum(column) for column in zip(*(count for count in counts if count is not None), strict=True))
    return {f"{BITS}{text}": loss / math.log(2) * labels / size} if size else {}
