"""`make pytest` runs four streams at once: its status, with stand-ins for pytest."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOGS = ("UNIT", "SLURM", "SLURM_TOO")
INSTALLED = (".venv/.installed", ".venv/.installed-evals", ".venv/transformer-engine/.unpacked")


@pytest.mark.parametrize(
    ("unit", "slurm", "too", "rest", "passed"),
    [
        (0, 0, 0, 0, True),
        (0, 5, 5, 5, True),  # no test chosen in three of them
        (5, 5, 5, 0, True),
        (5, 5, 5, 5, False),
        (1, 0, 0, 0, False),
        (0, 2, 0, 5, False),
        (0, 0, 2, 5, False),
        (5, 0, 0, 1, False),
        (5, 1, 5, 0, False),
        (5, 5, 1, 0, False),
    ],
)
def test_it_fails_if_a_stream_fails_or_none_has_tests(
    unit: int, slurm: int, too: int, rest: int, passed: bool, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    streams = f"*_cache/unit*) exit {unit};; *_cache/slurm-too*) exit {too};; *_cache/slurm*) exit {slurm};;"
    streams += f" *_cache/rest*) exit {rest};;"
    python.write_text(f'#!/bin/bash\ncase "$*" in {streams} *) exit 0;; esac\n')
    python.chmod(0o755)
    command = ["make", "pytest", f"BIN={tmp_path}", *(f"{name}_LOG={tmp_path}/{name}" for name in LOGS)]
    for file in INSTALLED:
        command += ["-o", file]  # as if it were new
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (ended.returncode == 0) is passed, ended
