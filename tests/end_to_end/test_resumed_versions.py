"""A run continues with other versions of Python and megatron-core than those that it began with, and back.

MMSCALE_OTHER_PYTHON=VENV/bin/python python -m pytest -m exhaustive tests/end_to_end/test_resumed_versions.py

`make test-versions` does this for each of its environments.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmscale.checkpoint.layout import Store
from mmscale.runs.metrics import read_metrics
from tests.end_to_end.running import ROOT

OTHER = "MMSCALE_OTHER_PYTHON"
STEPS, CHANGE = 20, 10


def train(python: str, config: Path, folder: Path) -> dict[int, tuple[float, float]]:
    """Train to the last step on two ranks; loss and gradient norm by step."""
    command = [python, "-m", "mmscale", "train", str(config), "--nproc", "2", f"run.dir={folder}"]
    settings = [f"train.steps={STEPS}", f"checkpoint.every={CHANGE}", "train.eval_every=0"]
    ended = subprocess.run([*command, *settings], cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert ended.returncode == 0, ended.stdout[-1000:] + ended.stderr[-4000:]
    lines = read_metrics(folder / "tiny")
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if "grad_norm" in line}


@pytest.mark.exhaustive
@pytest.mark.skipif(OTHER not in os.environ, reason=f"{OTHER} names no Python with other versions")
@pytest.mark.parametrize("forward", [True, False], ids=["to the other versions", "back"])
def test_a_run_continues_with_other_versions(forward: bool, config: Path, tmp_path: Path) -> None:
    """Every loss and gradient norm is that of the run without a change, bit by bit."""
    first, then = (sys.executable, os.environ[OTHER]) if forward else (os.environ[OTHER], sys.executable)
    whole = train(first, config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "changed")
    changed = Store.of_run(tmp_path / "changed" / "tiny")
    assert changed.steps() == [CHANGE, STEPS]
    shutil.rmtree(changed.path(STEPS))
    assert train(then, config, tmp_path / "changed") == whole
    assert changed.steps() == [CHANGE, STEPS] and sorted(whole) == list(range(1, STEPS + 1))
