"""Settings of the training objective (`objective`)."""

from __future__ import annotations

from typing import Annotated

from mmscale.config.section import OneOf, Section, Share, setting
from mmscale.tables.settings import IMAGE_SPANS


class ObjectiveConfig(Section):
    """What a document is turned into before it is trained on, besides predicting its next token."""

    cm3_rate: Share = setting(
        "Share of the documents that are trained on with causal masking (CM3), which teaches infilling: spans are "
        "replaced by holes and moved to the end of the document. Conversations are read as they are. Needs "
        "vocab.reserved. 0: none.",
        0.0,
        source="CM3, arXiv 2201.07520; CM3Leon, arXiv 2309.02591, section 2.2",
    )
    image_spans: Annotated[str, OneOf(IMAGE_SPANS)] = setting(
        f"Spans inside images and other items, which never cross their begin and end tokens. {IMAGE_SPANS.help}",
        "whole",
    )
