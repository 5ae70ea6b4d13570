"""What is shipped: files of the packages, nothing that lies about beside them, no secret, no odd rights."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CANARY = "canary-3b9d77c1e4"
PACKAGES = ("mmscale", "launch", "slurm", "checkpoints_tools")
SUFFIXES = {".py", ".typed", ".json", ".sbatch", ".html", ".css", ".js"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built of a copy in which secrets lie about, by a process that has some in its environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for place in (source, source / "mmscale", source / "mmscale" / "data"):
        for name in (".env", "id_ed25519", "secret.txt", "credentials.yaml", "core.1234", ".netrc"):
            (place / name).write_text(CANARY)
    environment = os.environ | {"HF_TOKEN": CANARY, "PYPI_PASSWORD": CANARY, "PIP_NO_INDEX": "1"}
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder), "."]
    ended = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=300)
    if ended.returncode != 0 and not os.environ.get("CI") and "setuptools" in ended.stderr:
        pytest.skip("setuptools is not installed")
    assert ended.returncode == 0, ended.stderr
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file)


def test_files(wheel: zipfile.ZipFile) -> None:
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == set(PACKAGES)
    assert {Path(name).suffix for name in names} <= SUFFIXES
    shipped = {path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    assert shipped <= set(names)


def test_no_secret_and_no_path_of_the_builder(wheel: zipfile.ZipFile) -> None:
    needles = [CANARY.encode(), str(Path.home()).encode() + b"/", str(ROOT).encode()]
    found = [name for name in wheel.namelist() for needle in needles if needle in wheel.read(name)]
    assert found == []
    assert not any(CANARY in name for name in wheel.namelist())


def test_rights(wheel: zipfile.ZipFile) -> None:
    """Not everybody may write, and nothing gets more rights than its caller has."""
    for entry in wheel.infolist():
        mode = entry.external_attr >> 16
        assert mode & 0o6002 == 0, (entry.filename, oct(mode))
