"""Transformer-Engine's own Python where its kernels cannot run, in processes of their own (tests/te_on_cpu/install.py).

megatron-core looks for Transformer-Engine once, when it is imported, so the checks cannot run in this process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.te_on_cpu import package

ROOT = Path(__file__).parents[2]
CHECKS = ROOT / "tests" / "te_on_cpu"
SHORT = ("checks_layers.py",)
LONG = (
    "checks_attention.py",
    "checks_benchmark.py",
    "checks_context.py",
    "checks_ring.py",
    "checks_checkpoints.py",
    "checks_steps.py",
    "checks_layouts.py",
    "checks_untied.py",
    "checks_untied_fp8.py",
    "checks_grouped_fp8.py",
    "checks_fp4.py",
)


def run_checks(*names: str, plugin: str = "tests.te_on_cpu.plugin", timeout_s: float) -> None:
    """Run files of tests in a process that has Transformer-Engine's Python."""
    if (why := package.missing()) is not None:
        if os.environ.get("CI"):
            pytest.fail(why, pytrace=False)
        pytest.skip(why)
    paths = os.pathsep.join((str(package.WHEEL), str(ROOT), os.environ.get("PYTHONPATH", "")))
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", plugin, "-W", "ignore", "-m", "")
    done = subprocess.run(
        (*command, *(str(CHECKS / name) for name in names)),
        env={**os.environ, "PYTHONPATH": paths},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_over_transformer_engines_python() -> None:
    run_checks(*SHORT, timeout_s=600)


@pytest.mark.long
@pytest.mark.parametrize("name", LONG)
def test_more_over_transformer_engines_python(name: str) -> None:
    run_checks(name, timeout_s=900)


@pytest.mark.exhaustive
def test_every_layout_model_and_recipe() -> None:
    run_checks("checks_matrix.py", timeout_s=3600)


@pytest.mark.exhaustive
def test_what_needs_a_gpu_where_torch_says_that_there_is_one() -> None:
    run_checks("checks_gpu.py", plugin="tests.te_on_cpu.plugin_everywhere", timeout_s=3600)


def test_every_file_of_checks_is_run() -> None:
    assert {path.name for path in CHECKS.glob("checks_*.py")} == {*SHORT, *LONG, "checks_matrix.py", "checks_gpu.py"}
