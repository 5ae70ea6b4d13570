"""Shards of the tests: together they are all tests, and none stands in two."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.shards import _shard, in_shard

ROOT = Path(__file__).resolve().parents[2]
TESTS = "import pytest\n@pytest.mark.parametrize('row', range(40))\ndef test_row(row): pass\n"


@given(st.text(), st.integers(1, 50), st.integers(0, 1000))
def test_every_test_is_in_one_of_n_consecutive_shards(name: str, shards: int, first: int) -> None:
    assert sum(in_shard(name, first + number, shards) for number in range(shards)) == 1


def _run(folder: Path, shard: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_rows.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "tests.shards", "--shard", shard]
    return subprocess.run(
        [*command, "-c", "/dev/null", "--rootdir", str(folder), "test_rows.py"],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )


def test_pytest_runs_the_shard(tmp_path: Path) -> None:
    found = [
        {line for line in _run(tmp_path, f"{number}/3").stdout.splitlines() if "::" in line} for number in range(3)
    ]
    assert len(set().union(*found)) == 40 == sum(map(len, found)) and all(found)


@pytest.mark.parametrize("shard", ["3", "3/0", "a/2"])
def test_a_wrong_shard_is_refused(shard: str) -> None:
    with pytest.raises(pytest.UsageError, match="--shard is K/N"):
        _shard(shard)


def test_pytest_shows_what_is_wrong(tmp_path: Path) -> None:
    result = _run(tmp_path, "3")
    assert result.returncode != 0 and "--shard is K/N" in result.stderr, result
