"""Collects the content of a run folder's environment.json.

The environment of a run: code version, package versions, hosts, devices. Only listed items, so that it cannot contain a
secret. doctor.py checks the environment. Needs no torch except for the device's name.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import mmscale
from mmscale.runtime.rank_env import expand_hostlist

ENVIRONMENT = "environment.json"
# Only these packages are looked up: a list of all packages would show names of private ones.
PACKAGES = (
    "torch",
    "megatron-core",
    "numpy",
    "pydantic",
    "PyYAML",
    "typer",
    "rich",
    "tokenizers",
    "transformers",
    "safetensors",
    "pillow",
    "pyarrow",
    "zarr",
    "tensorstore",
    "tensorboard",
    "wandb",
    "submitit",
    "mpi4py",
    "triton",
    "transformer-engine",
    "transformer-engine-torch",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
)
_VARIABLES = (
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "SLURM_CLUSTER_NAME",
    "SLURM_JOB_ID",
    "SLURM_JOB_NUM_NODES",
    "SLURM_NTASKS",
    "SLURM_STEP_ID",
)
_VARIABLE_PREFIXES = ("GLOO_", "NCCL_", "NVTE_", "TORCH_NCCL_")
_LONGEST_DIFF = 100_000  # characters


def environment_of_run(**facts: Any) -> dict[str, Any]:
    """The content of environment.json.

    Args:
        facts: Further entries, e.g. attempt=2, world_size=8.
    """
    return describe() | {"hosts": _hosts(), "devices": _devices(), **facts}


def environment_text(content: dict[str, Any]) -> bytes:
    """The file's bytes."""
    return (json.dumps(content, indent=1, default=str) + "\n").encode()


def describe() -> dict[str, Any]:
    """Code, packages and variables of this process. No torch."""
    known = [name for name in os.environ if name in _VARIABLES or name.startswith(_VARIABLE_PREFIXES)]
    return {
        "mmscale": mmscale.__version__,
        "git": git_state(),
        "code": str(Path(mmscale.__file__).parent.parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "variables": {name: os.environ[name] for name in sorted(known)},
    }


def package_versions() -> dict[str, str]:
    """Versions of those of our packages that are installed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def code_version() -> str:
    """Version of mmscale, with the commit where it runs from a git checkout: "0.1.0+126b1c7d4f00"."""
    folder = Path(mmscale.__file__).parent
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return mmscale.__version__
    commit = _git(folder, "rev-parse", "--short=12", "HEAD")
    return f"{mmscale.__version__}+{commit}" if commit else mmscale.__version__


def git_state() -> dict[str, Any] | None:
    """Commit of the code that runs, whether it was changed since, and the change; None outside a git checkout."""
    folder = Path(mmscale.__file__).parent
    # If the package is installed in a virtual environment inside another checkout, that commit is not the package's.
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    # Only changes of the package count, not those of other files in the checkout.
    status = _git(folder, "status", "--porcelain", "--", ".")
    diff = _git(folder, "diff", "HEAD", "--", ".") or ""
    state: dict[str, Any] = {"commit": _git(folder, "rev-parse", "HEAD"), "dirty": bool(status)}
    if diff:
        cut = f"\n... {len(diff)} characters in all" if len(diff) > _LONGEST_DIFF else ""
        state["diff"] = diff[:_LONGEST_DIFF] + cut
    return state


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(folder), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _hosts() -> list[str]:
    listed = os.environ.get("SLURM_STEP_NODELIST") if "SLURM_PROCID" in os.environ else None
    return expand_hostlist(listed) if listed else [socket.gethostname()]


def _devices() -> list[str]:
    if "torch" not in sys.modules:  # called by a command that does not import torch
        return []
    from mmscale.runtime import device

    return [device.device_name()]
