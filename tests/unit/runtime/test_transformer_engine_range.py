"""Versions of Transformer-Engine: which are refused in words, and that no two places name others."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from mmscale.runtime import engine_range

ROOT = Path(__file__).parents[3]


# In a process of its own: elsewhere the CPU adaptor hides the package (megatron_cpu.py).
ASKS = """
from mmscale.runtime import device, transformer_engine
device.has_cuda = lambda: True
transformer_engine.require("model.backend = te")
"""


@pytest.mark.parametrize("old", ["1.13.0", "2.8.0"])
def test_an_old_version_is_refused_before_it_is_imported(tmp_path: Path, old: str) -> None:
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise SystemError('imported')")
    info = tmp_path / f"transformer_engine-{old}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformer-engine\nVersion: {old}\n")
    paths = os.pathsep.join((str(tmp_path), str(ROOT)))
    ended = subprocess.run(
        [sys.executable, "-c", ASKS],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    last = ended.stderr.splitlines()[-1]
    assert f"ConfigError: model.backend = te needs Transformer-Engine, but it is {old}" in last, ended
    assert f"mmscale needs {engine_range.FIRST} or newer" in last
    assert engine_range.WANTED in last


def test_every_version_that_was_tried_is_in_the_range() -> None:
    wanted = SpecifierSet(engine_range.WANTED)
    assert all(version in wanted for version in engine_range.TRIED)
    assert engine_range.TRIED[0].startswith(engine_range.FIRST)


def test_the_extra_asks_for_the_same_versions() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (line,) = extras["gpu"]
    assert Requirement(line).specifier == SpecifierSet(engine_range.WANTED)


def test_install_page_asks_for_the_same_versions() -> None:
    assert f"pytorch]{engine_range.WANTED}'" in (ROOT / "docs" / "install.md").read_text()
