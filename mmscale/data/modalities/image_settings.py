"""The settings file of an image tokenizer's folder, and its settings for making pictures square.

image_tokens.py opens the tokenizer; image_files.py resizes pictures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SETTINGS = "image_tokenizer.json"


@dataclass(frozen=True)
class Fitting:
    """How pictures of any proportions become opaque squares.

    It affects the codes of a picture, so it is saved with the tokenizer and is part of its fingerprint. For the default
    values, which are those of older versions, both are omitted.

    Attributes:
        fit: a name in `mmscale.tables.settings.IMAGE_FITS`.
        background: red, green and blue, 0 to 255: shows through transparency, and pads a picture.
    """

    fit: str = "crop"
    background: tuple[int, int, int] = (255, 255, 255)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Fitting:
        """From a settings file; missing entries have their default."""
        default = cls()
        red, green, blue = settings.get("background", default.background)
        return cls(settings.get("fit", default.fit), (red, green, blue))

    def changed(self) -> dict[str, Any]:
        """The entries that differ from the default, for a settings file."""
        default = Fitting()
        found: dict[str, Any] = {} if self.fit == default.fit else {"fit": self.fit}
        return found if self.background == default.background else found | {"background": list(self.background)}


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write a tokenizer's settings file; creates the folder if necessary."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
