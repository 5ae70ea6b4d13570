"""Is Transformer-Engine here, and can it be used? Asked before anything of it is imported.

`import transformer_engine` fails in more ways than ImportError: RuntimeError without cuDNN, OSError for an undefined
symbol of cuBLAS. megatron-core catches ImportError only, and so cannot itself be imported then.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from importlib import metadata

import torch  # noqa: F401  first: Transformer-Engine's libraries find CUDA's through those that torch has loaded

from mmscale.errors import ConfigError
from mmscale.runtime import device

WANTED = ">=2.9,<2.12"  # what megatron-core 0.16.1 asks for
INSTALL = f"pip install --no-build-isolation 'transformer-engine[core_cu13,pytorch]{WANTED}' (docs/install.md)"


@functools.cache
def problem() -> str | None:
    """Why Transformer-Engine's layers cannot run here, in words; None: they can."""
    if not device.has_cuda():
        return "there is no CUDA device"
    if importlib.util.find_spec("transformer_engine") is None:
        return "it is not installed"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # see above
        return f"it cannot be imported: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return None


def usable() -> bool:
    """Whether its layers can run here."""
    return problem() is None


def version() -> str | None:
    """Its version as installed; None: it is not."""
    for package in ("transformer-engine", "transformer-engine-torch"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def require(asking: str) -> None:
    """Refuse a setting that needs Transformer-Engine where it cannot run.

    Args:
        asking: the setting with its value, e.g. "model.backend = te".

    Raises:
        ConfigError: it cannot run here.
    """
    found = problem()
    if found is None:
        return
    remedy = "use model.backend=auto, which takes it where it can run"
    if "CUDA device" not in found:
        remedy += f"; or install it: {INSTALL}"
    raise ConfigError(f"{asking} needs Transformer-Engine, but {found}", remedy=remedy)
