"""A user's folder with the name of one of mmscale's packages: refused in words if Python would import it instead."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mmscale.cli.shadowed import PACKAGES
from tests.end_to_end.running import ROOT, Ended, assert_says


def version(folder: Path, *options: str, **environment: str) -> Ended:
    """`python -m mmscale --version`, started in a folder."""
    command = [sys.executable, *options, "-m", "mmscale", "--version"]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    ended = subprocess.run(command, cwd=folder, env=plain | environment, capture_output=True, text=True, timeout=300)
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def make(folder: Path, name: str, kind: str) -> None:
    if kind == "module":
        (folder / f"{name}.py").touch()
        return
    (folder / name).mkdir()
    if kind == "package":
        (folder / name / "__init__.py").touch()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("launch", "module"),
        ("slurm", "folder"),
        *(pytest.param(name, "package", marks=pytest.mark.long) for name in ("launch", "checkpoints_tools")),
    ],
)
def test_it_is_named(name: str, kind: str, tmp_path: Path) -> None:
    make(tmp_path, name, kind)
    place = tmp_path / (f"{name}.py" if kind == "module" else name)
    said = {"cause": rf"{place} hides mmscale's own package '{name}' \({ROOT / name}\)", "remedy": "rename it, or keep"}
    assert_says(version(tmp_path), status=2, **said)
    # Another folder's, found by PYTHONPATH; an editable install loses against a folder without __init__.py too.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert_says(version(elsewhere, PYTHONPATH=str(tmp_path)), status=2, **said)
    # The remedies.
    assert version(tmp_path, "-P").status == 0
    assert version(elsewhere).status == 0
    place.rename(tmp_path / "renamed")
    assert version(tmp_path, PYTHONPATH=str(tmp_path)).status == 0


@pytest.mark.parametrize("name", ["checkout", "linked"])
def test_its_own_are_not_refused(name: str, tmp_path: Path) -> None:
    """From the checkout, and by a link to it."""
    folder = ROOT
    if name == "linked":
        folder = tmp_path / "link"
        folder.symlink_to(ROOT)
    assert version(folder).status == 0
    assert version(tmp_path, PYTHONPATH=str(folder)).status == 0


def test_every_package_beside_mmscale_is_checked() -> None:
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["root_packages"]
    assert {"mmscale", *PACKAGES} == set(found)
