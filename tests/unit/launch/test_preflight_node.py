"""Checks of a node: each of them finds what it is for, and can be turned off."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from launch import cordon
from launch.profile import Check
from slurm.preflight import CHECKS, MAX_SKEW_S, Wanted, clock_problems, examine

ROOT = Path(__file__).parents[3]
HEALTHY = {"name": [["H100"]] * 2, "memory.used": [["0", "3"], ["1", "3"]], "ecc": [["0", "0"], ["1", "[N/A]"]]}


def smi(**changes: list[list[str]]) -> Callable[[str], list[list[str]]]:
    """nvidia-smi's answers to the three questions that are asked."""
    answers = HEALTHY | {key.replace("_used", ".used"): rows for key, rows in changes.items()}
    return lambda fields: next(rows for key, rows in answers.items() if key in fields)


def problems(run: Path, *, skip: tuple[str, ...] = (), **changes: list[list[str]]) -> dict[str, str]:
    return examine(Wanted(gpus=2, disk_gb=0, shared_memory_gb=0, run=run), skip=skip, smi=smi(**changes))["problems"]


def test_a_healthy_node_has_none(tmp_path: Path) -> None:
    assert problems(tmp_path) == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("check", "changes", "said"),
    [
        ("gpus", {"name": [["H100"]]}, "1 of 2 GPUs are there"),
        ("gpu_idle", {"memory_used": [["0", "3"], ["1", "70000"]]}, "GPU 1: 70000 MiB"),
        ("gpu_memory_errors", {"ecc": [["0", "4"], ["1", "0"]]}, "GPU 0: 4"),
    ],
)
def test_devices(tmp_path: Path, check: str, changes: dict[str, list[list[str]]], said: str) -> None:
    found = problems(tmp_path, **changes)
    assert list(found) == [check] and said in found[check]
    assert problems(tmp_path, skip=(check,), **changes) == {}


def test_space_and_the_run_folder(tmp_path: Path) -> None:
    found = examine(Wanted(disk_gb=1e9, shared_memory_gb=1e9, run=tmp_path))["problems"]
    assert set(found) == {"disk", "shared_memory"} and "wants 1e+09" in found["disk"]
    gone = examine(Wanted(disk_gb=0, shared_memory_gb=0, run=tmp_path / "gone"), skip=("disk",))["problems"]
    assert list(gone) == ["run_folder"] and "No such file" in gone["run_folder"]


def test_without_a_driver_the_devices_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = examine(Wanted(gpus=1, disk_gb=0, shared_memory_gb=0, run=tmp_path))["problems"]
    assert "nvidia-smi" in found["gpus"]


def test_clocks_are_compared_between_nodes() -> None:
    answers = [{"node": f"n{number}", "time": 1000.0 + number} for number in range(4)]
    assert clock_problems(answers, within_s=4) == {}
    answers.append({"node": "late", "time": 1000.0 - MAX_SKEW_S - 10})
    assert list(clock_problems(answers, within_s=4)) == ["late"]
    assert "off" in clock_problems(answers, within_s=4)["late"]
    assert clock_problems([], within_s=1) == {}


def test_the_command_prints_one_object_and_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, runpy; sys.argv = ['preflight', *sys.argv[1:]]\n"
        "try: runpy.run_module('slurm.preflight', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(tmp_path), "--skip", "disk", "--disk-gb", "1e9"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["problems"] == {}


def test_every_check_can_be_named_in_a_profile() -> None:
    assert get_args(Check) == CHECKS


def test_the_cordon_file_takes_a_node_once_and_one_line_each(tmp_path: Path) -> None:
    file = tmp_path / "shared" / "cordoned.txt"
    assert cordon.add(file, ["n1", "n2"], reason="disk: 0 GB\nfree # really") == ["n1", "n2"]
    assert cordon.add(file, ["n2", "n3", "x;y"], reason="clock") == ["n3"]
    lines = file.read_text().splitlines()
    assert [line.split("  # ")[0] for line in lines] == ["n1", "n2", "n3"]
    assert "disk: 0 GB free really, " in lines[0]
    assert cordon.read(file) == ["n1", "n2", "n3"]
