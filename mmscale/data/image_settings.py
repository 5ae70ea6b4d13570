"""The file that says what an image tokenizer in a folder is; kinds know their settings, image_tokens.py opens it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SETTINGS = "image_tokenizer.json"


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write a tokenizer's settings file; the folder is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
