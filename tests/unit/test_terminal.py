"""What surrounds a command: the level of messages, colours (NO_COLOR), and completion by the shell."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmscale.cli import main

ROOT = Path(__file__).parents[2]
COLOUR = re.compile(rb"\x1b\[[0-9;]*m")


def mmscale(*arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "MMSCALE_LOG_LEVEL"}
    command = [sys.executable, "-m", "mmscale", *map(str, arguments)]
    return subprocess.run(command, env=kept | environ, cwd=ROOT, capture_output=True, text=True, check=True)


@pytest.fixture
def torn(tmp_path: Path) -> Path:
    """A run whose last event was cut off."""
    (tmp_path / "events.jsonl").write_text('{"time": 1.0, "attempt": 1, "event": "start"}\n{"time": 2.0, "att')
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "environ", "printed"),
    [
        ([], {}, False),
        (["--log-level", "info"], {}, True),
        ([], {"MMSCALE_LOG_LEVEL": "debug"}, True),
        (["--log-level", "error"], {"MMSCALE_LOG_LEVEL": "debug"}, False),
    ],
    ids=["default", "option", "variable", "option_first"],
)
def test_messages_from_a_level_on(torn: Path, arguments: list[str], environ: dict[str, str], printed: bool) -> None:
    done = mmscale(*arguments, "status", torn, "--json", **environ)
    assert ("INFO mmscale.runs.json_lines: " in done.stderr) is printed
    assert done.stdout.startswith("[") or done.stdout.startswith("{"), "results stay on stdout"


def test_an_unknown_level(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--log-level", "loud", "status"]) == 2
    error = capsys.readouterr().err
    assert "'debug', 'info', 'warning', 'error'" in error
    assert "\n  fix: " in error


def on_terminal(*arguments: str, **environ: str) -> bytes:
    """What a command prints on a terminal."""
    ours, its = pty.openpty()
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    command = [sys.executable, "-m", "mmscale", *arguments]
    process = subprocess.Popen(
        command, env=kept | {"TERM": "xterm-256color"} | environ, cwd=ROOT, stdout=its, stderr=its, stdin=its
    )
    os.close(its)
    printed = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux: the last writer has closed the terminal
            break
        if not chunk:
            break
        printed += chunk
    os.close(ours)
    assert process.wait() == 0, printed
    return printed


@pytest.mark.parametrize("arguments", [("plan", "configs/quickstart.yaml", "--gpus", "2"), ("--help",)], ids=" ".join)
def test_no_color_is_honoured(arguments: tuple[str, ...]) -> None:
    """https://no-color.org: bold and underlined text is allowed, colours are not."""
    coloured = re.compile(rb"\x1b\[(?:\d+;)*(?:3\d|4\d|9\d|10\d)(?:;\d+)*m")
    assert COLOUR.search(on_terminal(*arguments)), "a terminal gets escapes without the variable"
    assert not coloured.search(on_terminal(*arguments, NO_COLOR="1"))


def test_the_shell_completes_commands() -> None:
    words = {"_MMSCALE_COMPLETE": "complete_bash", "COMP_WORDS": "mmscale conv", "COMP_CWORD": "1"}
    assert mmscale(**words).stdout.split() == ["convert"]
