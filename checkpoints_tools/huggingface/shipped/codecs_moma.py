"""Modalities of this folder's model besides text and images: name -> class. `convert to-hf` fills it in."""

from typing import Any

CODECS: dict[str, Any] = {}

__all__ = ["CODECS"]
