"""Modalities besides text and images that this folder's model has: name -> class. `convert to-hf` fills it in."""

from typing import Any

CODECS: dict[str, Any] = {}

__all__ = ["CODECS"]
