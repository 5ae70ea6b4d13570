"""Where Transformer-Engine's Python is unpacked, and of which version it is."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from packaging.version import Version

# Another version than the pinned one: a folder made by `pip install --no-deps --target` (tests/versions.py).
WHEEL = Path(os.environ.get("MMSCALE_TRANSFORMER_ENGINE", Path(sys.prefix) / "transformer-engine"))


def version() -> Version:
    """The version of the package in `WHEEL`.

    Raises:
        ModuleNotFoundError: there is none.
    """
    for folder in WHEEL.glob("transformer_engine-*.dist-info"):
        return Version(folder.name.removesuffix(".dist-info").partition("-")[2])
    raise ModuleNotFoundError(f"Transformer-Engine's Python is not in {WHEEL}", name="transformer_engine")


def missing() -> str | None:
    """Why the tests over Transformer-Engine's Python cannot run here; None: they can."""
    if (WHEEL / "transformer_engine").is_dir():
        return None
    return f"Transformer-Engine's Python is not in {WHEEL}: run `make transformer-engine`"
