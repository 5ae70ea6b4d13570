"""Checks whether Transformer-Engine is installed and usable, before it is imported.

`import transformer_engine` can fail with more than ImportError: RuntimeError without cuDNN, OSError for an undefined
symbol of cuBLAS. megatron-core catches ImportError only, so its own import would fail.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import os
import sys
from importlib import metadata
from typing import Any

import torch  # noqa: F401  first: Transformer-Engine's libraries find CUDA's through those that torch has loaded
from packaging.version import Version

from mmscale.errors import ConfigError
from mmscale.runtime import device
from mmscale.runtime.engine_range import FIRST, WANTED

INSTALL = f"pip install --no-build-isolation 'transformer-engine[core_cu13,pytorch]{WANTED}' (docs/install.md)"


@functools.cache
def problem() -> str | None:
    """Why Transformer-Engine's layers cannot run here; None: they can."""
    if not device.has_cuda():
        return "there is no CUDA device"
    if importlib.util.find_spec("transformer_engine") is None:
        return "it is not installed"
    found = version()
    if found is not None and Version(found) < Version(FIRST):
        return f"it is {found}, and mmscale needs {FIRST} or newer"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # see above
        return f"it cannot be imported: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return None


def blackwell_problem(recipe: str) -> str | None:
    """Why Transformer-Engine has no kernels of a recipe for this GPU; None: it has. Call it if `problem` found nothing.

    Args:
        recipe: a value of precision.fp8; of these only mxfp8 and nvfp4 need a newer GPU than Hopper.
    """
    if recipe not in ("mxfp8", "nvfp4"):
        return None
    pytorch = importlib.import_module("transformer_engine.pytorch")
    available, reason = getattr(pytorch, f"is_{recipe}_available")(return_reason=True)
    return None if available else str(reason)


def usable() -> bool:
    """Whether its layers can run here."""
    return problem() is None


def known_fields(kind: type[Any], **newer: Any) -> dict[str, Any]:
    """Those of the values that a data class of Transformer-Engine has fields for: versions add fields."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in newer.items() if name in names}


def forget_scales() -> None:
    """Clear Transformer-Engine's global state of delayed scaling: the amax buffers of all modules ever made.

    At the end of every forward pass it reduces them over the groups with which they were created, even if the modules
    and the groups no longer exist: the next layout would wait for ranks that no longer take part.
    """
    if "transformer_engine.pytorch" in sys.modules:
        importlib.import_module("transformer_engine.pytorch.fp8").FP8GlobalStateManager.reset()


# Maps (NVTE_FLASH_ATTN, NVTE_FUSED_ATTN) to megatron-core's name of the backend; NVTE_UNFUSED_ATTN must have the
# value in _UNFUSED.
_ATTENTION = {("1", "1"): "auto", ("0", "1"): "fused", ("1", "0"): "flash", ("0", "0"): "unfused"}
_UNFUSED = {"auto": "1", "fused": "0", "flash": "0", "unfused": "1"}


def attention_backend() -> str:
    """The attention kernels that the environment's variables allow, by megatron-core's name (enums.py, AttnBackend).

    megatron-core sets the variables itself and fails with an assertion if they have other values (language_module.py),
    so a machine's NVTE_FLASH_ATTN=0 must be passed on as its setting.

    Raises:
        ConfigError: the values of the three variables contradict each other.
    """
    environ = os.environ
    flash, fused = environ.get("NVTE_FLASH_ATTN", "1"), environ.get("NVTE_FUSED_ATTN", "1")
    found = _ATTENTION.get((flash, fused))
    if found is None or environ.get("NVTE_UNFUSED_ATTN", _UNFUSED[found]) != _UNFUSED[found]:
        raise ConfigError(
            f"NVTE_FLASH_ATTN={flash}, NVTE_FUSED_ATTN={fused} and NVTE_UNFUSED_ATTN="
            f"{environ.get('NVTE_UNFUSED_ATTN', 'unset')} are no choice that megatron-core knows",
            remedy="unset NVTE_UNFUSED_ATTN, and set the others to 0 or 1, or unset all three",
        )
    return found


def version() -> str | None:
    """Its installed version; None: it is not installed."""
    for package in ("transformer-engine", "transformer-engine-torch"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def require(asking: str) -> None:
    """Refuse a setting that needs Transformer-Engine if it cannot run here.

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
