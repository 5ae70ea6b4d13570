"""`mmscale init`: what it writes is right, and nothing is overwritten."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from launch.profile import load_profile
from mmscale.cli import app, main
from mmscale.config.load import load
from mmscale.presets import FOLDER, PRESETS, copy

ROOT = Path(__file__).resolve().parents[2]
# Runs the program that follows as `python` does, in a process that cannot import mmscale.
HIDDEN = (
    "import runpy, sys; sys.modules['mmscale'] = None; del sys.argv[0]; runpy.run_path(sys.argv[0], None, '__main__')"
)


@pytest.mark.parametrize("preset", ["quickstart", pytest.param("slurm", marks=pytest.mark.long)])
def test_its_program_writes_what_its_configuration_names(preset: str, tmp_path: Path) -> None:
    """With a Python that has no mmscale: the program is an example of a user's own."""
    copy(preset, tmp_path)
    (command,) = re.findall(r"^ *(python .+)$", (tmp_path / "README.md").read_text(), re.MULTILINE)
    program = [sys.executable, "-c", HIDDEN, *command.split()[1:], "--copies", "0"]
    subprocess.run(program, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    settings = load(tmp_path / "configs/quickstart.yaml").data.prepare
    assert settings is not None
    named = [*settings.documents, *settings.tasks.values()]
    assert len(named) == 2 and all((tmp_path / name).stat().st_size > 0 for name in named)


def commands(readme: str) -> list[list[str]]:
    return [line.split() for line in re.findall(r"^ *(mmscale .+)$", readme, re.MULTILINE)]


def test_every_folder_is_a_preset() -> None:
    assert {folder.name for folder in FOLDER.iterdir() if folder.is_dir() and folder.name != "__pycache__"} == set(
        PRESETS
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_settings_and_commands(preset: str, tmp_path: Path) -> None:
    files = copy(preset, tmp_path)
    for file in files:
        if file.parent.name == "configs":
            load(file)
        elif file.parent.name == "cluster":
            assert load_profile(str(file)).nodes == 1
    (readme,) = (file for file in files if file.name == "README.md")
    found = commands(readme.read_text())
    assert len(found) == 5
    known = typer.main.get_command(app)
    for command in found:
        group = known
        for word in command[1:]:
            group = getattr(group, "commands", {}).get(word, group)
        assert group is not known, command
        assert not hasattr(group, "commands"), command
        for word in command:
            if word.startswith("--"):
                assert any(word in parameter.opts for parameter in group.params), (word, command)
            if word.startswith("configs/"):
                assert (tmp_path / word).exists()


@pytest.mark.parametrize("preset", ["quickstart", "slurm"])
@pytest.mark.parametrize(
    ("file", "original"),
    [
        ("configs/quickstart.yaml", "configs/quickstart.yaml"),
        ("write_documents.py", "examples/digits/write_documents.py"),
    ],
)
def test_the_quickstart_is_that_of_the_checkout(preset: str, file: str, original: str, tmp_path: Path) -> None:
    """The presets hold copies: not every way of copying a repository keeps symbolic links. Change both files."""
    copy(preset, tmp_path)
    assert (tmp_path / file).read_text() == (ROOT / original).read_text()
    assert not [file for file in FOLDER.rglob("*") if file.is_symlink()]


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text("mine")
    assert main(["init", str(tmp_path)]) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "mine"
    assert "README.md exists already" in capsys.readouterr().err
    copy("own-data", tmp_path / "all")
    assert main(["init", str(tmp_path / "all"), "--preset", "own-data"]) == 2
    assert "own.yaml exist already" in capsys.readouterr().err


def test_an_unknown_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", str(tmp_path / "new"), "--preset", "large"]) == 2
    assert "choose one of: quickstart, own-data, slurm" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
