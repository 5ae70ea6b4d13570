"""Transformer-Engine's layers where it cannot run: megatron-core's wrappers over a stand-in with its interface."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STAND_IN = ROOT / "tests" / "te_stand_in"


def test_layers_of_transformer_engine_are_the_torch_backends() -> None:
    """In a process of its own: megatron-core looks for Transformer-Engine once, when it is imported."""
    paths = os.pathsep.join((str(STAND_IN), str(ROOT), os.environ.get("PYTHONPATH", "")))
    command = (sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(STAND_IN / "checks_te.py"))
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, cwd=ROOT, capture_output=True, text=True, timeout=480
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
