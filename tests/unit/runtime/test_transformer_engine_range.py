"""Versions of Transformer-Engine: which are refused in words, and that no two places name others."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from mmscale.errors import ConfigError
from mmscale.runtime import device, engine_range, transformer_engine

ROOT = Path(__file__).parents[3]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path for a package of the name, on a machine that seems to have a GPU."""
    (tmp_path / "transformer_engine").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    transformer_engine.problem.cache_clear()
    yield tmp_path
    transformer_engine.problem.cache_clear()


@pytest.mark.parametrize("old", ["1.13.0", "2.8.0"])
def test_an_old_version_is_refused_before_it_is_imported(installed: Path, old: str) -> None:
    (installed / "transformer_engine" / "__init__.py").write_text("raise SystemError('imported')")
    info = installed / f"transformer_engine-{old}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformer-engine\nVersion: {old}\n")
    with pytest.raises(ConfigError, match=f"it is {old}, and mmscale needs 2.9 or newer") as caught:
        transformer_engine.require("model.backend = te")
    assert engine_range.WANTED in caught.value.remedy


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
