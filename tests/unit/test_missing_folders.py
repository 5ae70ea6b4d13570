"""What is missing is named with the place where it was looked for: paths are relative to the working directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmscale.cli import main
from mmscale.config.load import dump
from tests.unit.config.test_changes import config

COMMANDS = {
    "eval": ["eval", "{}"],
    "sample": ["sample", "{}", "--prompt", "x"],
    "convert": ["convert", "to-hf", "{}", "out"],
    "status": ["status", "{}"],
    "logs": ["logs", "{}"],
    "stop": ["stop", "{}"],
    "resume": ["resume", "{}"],
    "report": ["report", "{}"],
    "inspect": ["data", "inspect", "{}"],
    "prepare": ["data", "prepare", "--documents", "{}", "--out", "out", "vocab.modalities=[{{name: text, size: 300}}]"],
    "plan": ["plan", "--data", "{}"],
    "train": ["train", "own.yaml", "data.path={}"],
    "launch": ["launch", "own.yaml", "data.path={}", "--dry-run"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("relative", [True, False])
def test_the_place_is_named(
    command: str, relative: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text(dump(config()))
    named = "some/where" if relative else str(tmp_path / "some/where")
    assert main([word.format(named) for word in COMMANDS[command]]) != 0
    (cause,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    what = "document file" if command in ("prepare", "plan") else "folder"
    assert f"there is no {what} {named}" + (f" in {tmp_path}" if relative else "") in cause
    assert cause.count(str(tmp_path)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.yaml"]
