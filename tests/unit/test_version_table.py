"""`make test-versions`: which environments it makes, what is pinned in them, and what it says of results."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from checkpoints_tools.huggingface.shipped.versions_moma import NEWEST, OLDEST
from mmscale.runtime.doctor import MEGATRON, MEGATRON_TRIED
from tests import versions
from tests.versions import ROOT, Combination, combinations

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_supported_version_is_in_the_table() -> None:
    rows = list(combinations())
    required = {text.split(">")[0]: text for text in PROJECT["dependencies"]}["megatron-core"]
    allowed = SpecifierSet(required.removeprefix("megatron-core"))
    minors = {version.rpartition(".")[0] for version in versions.MEGATRONS}
    assert all(version in allowed for version in versions.MEGATRONS)
    assert set(MEGATRON_TRIED) <= set(versions.MEGATRONS), "mmscale doctor names what this table has tried"
    assert minors == {"0.16", "0.17", "0.18", "0.19"}
    assert {(row.python, row.megatron) for row in rows if row.transformers == NEWEST} == {
        ("3.11", MEGATRON),
        *((python, version) for python in ("3.12", "3.13") for version in versions.MEGATRONS),
    }
    assert {row.python for row in rows if row.transformers == OLDEST} == set(versions.PYTHONS)
    assert versions.PYTHONS[0] in PROJECT["requires-python"]
    assert len({row.name for row in rows}) == len(rows)


def test_tests_of_the_table_exist() -> None:
    for names in versions.TESTS.values():
        assert all((ROOT / name).exists() for name in names)
    assert (ROOT / versions.RESUME[-1]).exists()


def test_pins() -> None:
    """Everything is pinned but what a combination replaces, and what another transformers needs in another version."""
    pinned = {versions._package(line): line for line in versions.CONSTRAINTS.read_text().splitlines() if "==" in line}
    newest = Combination("3.12", "0.19.2", NEWEST).constraints().splitlines()
    assert set(pinned.values()) - set(newest) == {pinned["megatron-core"], pinned["transformers"]}
    oldest = Combination("3.12", "0.19.2", OLDEST).constraints().splitlines()
    assert set(newest) - set(oldest) == {pinned["tokenizers"], pinned["huggingface-hub"]}
    assert any(line.startswith("torch==") for line in oldest)


@pytest.mark.parametrize(
    ("text", "status", "said", "good"),
    [
        ("....\n4 passed, 1 skipped, 3 warnings in 2.10s", 0, "4 passed, 1 skipped", True),
        ("FAILED a\n1 failed, 4 passed in 62.10s (0:01:02)", 1, "1 failed, 4 passed", False),
        ("ERROR a\n2 errors in 0.50s", 2, "2 errors", False),
        ("2 skipped, 5 deselected in 0.50s", 0, "2 skipped", False),
        ("no tests ran in 0.01s", 5, "exit status 5", False),
        ("4 passed in 2.10s", 1, "exit status 1", False),  # something else went wrong
        ("Segmentation fault", -11, "exit status -11", False),
        ("", 4, "exit status 4", False),
    ],
)
def test_what_pytest_says(text: str, status: int, said: str, good: bool) -> None:
    assert versions.summary(text, status) == said
    assert versions.passed(said) is good


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.versions", str(folder), *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=600)


def test_what_was_not_tried_is_said(tmp_path: Path) -> None:
    """Also why, if it was asked for: no such Python."""
    one = tmp_path / f"3.11-0.16.1-{NEWEST}"
    one.mkdir()
    (one / "results.json").write_text(json.dumps({"layouts": "1 failed, 25 passed", "runtime": "9 passed"}))
    ended = run(tmp_path, "--table")
    assert ended.returncode == 0, ended
    rows = [line for line in ended.stdout.splitlines() if line.startswith("| 3.")]
    assert len(rows) == len(list(combinations()))
    tried = [row for row in rows if not row.endswith("| not tried |")]
    (row,) = tried
    assert "layouts: 1 failed, 25 passed; runtime: 9 passed; model: not tried" in row
    nothing = {"PATH": str(tmp_path), "PYENV_ROOT": str(tmp_path)}
    ended = run(tmp_path, "--only", "3.13-0.19.2", **nothing)
    assert ended.returncode == 1
    assert re.search(rf"^3.13-0.19.2-{re.escape(NEWEST)}  not tried: there is no python3.13$", ended.stdout, re.M)
    assert sorted(path.name for path in tmp_path.iterdir()) == [one.name]


def test_a_combination_that_does_not_exist(tmp_path: Path) -> None:
    ended = run(tmp_path, "--only", "2.7")
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == [
        "error: no combination's name contains 2.7",
        "remedy: choose from those that --list prints",
    ]
