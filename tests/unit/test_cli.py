# The command line: help, JSON, the two lines of an error, exit status. What commands compute is tested elsewhere.
"""Tests of mmscale.cli."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from mmscale import __version__
from mmscale.cli import app, main
from mmscale.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LaunchError,
    MmscaleError,
    TrainingError,
    UsageError,
)
from tests.support import spoken

CONFIG = """
run: {name: tiny}
model: {num_layers: 2, hidden_size: 64, ffn_hidden_size: 64, num_attention_heads: 2, seq_length: 64,
        experts: {counts: {text: 2, image: 2}}}
data: {path: data/tiny}
train: {steps: 20}
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(CONFIG)
    return file


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a command in an empty folder; returns exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MMSCALE_DEBUG", raising=False)

    def call(*arguments: object) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, spoken(captured.err)

    return call


def commands(group: Any = None, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    group = typer.main.get_command(app) if group is None else group
    found: list[tuple[str, ...]] = []
    for name, command in group.commands.items():
        found += commands(command, (*path, name)) if hasattr(command, "commands") else [(*path, name)]
    return found


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Status and output of every command's help and of those for login nodes, in one fresh interpreter."""
    config = tmp_path_factory.mktemp("help") / "tiny.yaml"
    config.write_text(CONFIG)
    lines = [[*command, "--help"] for command in commands()]
    lines += [["--help"], ["config", "check", str(config)], ["config", "explain", "optim.lr"], ["plan", str(config)]]
    program = (
        "import contextlib, io, json, sys\nfrom mmscale.cli import main\nsaid = []\n"
        f"for line in {lines!r}:\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        status = main(line)\n"
        "    said.append((' '.join(line), [status, out.getvalue()]))\n"
        "heavy = [name for name in ('torch', 'megatron', 'matplotlib', 'transformers') if name in sys.modules]\n"
        "print(json.dumps({'said': dict(said), 'heavy': heavy}))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    found: dict[str, Any] = json.loads(result.stdout)
    assert len(found["said"]) == len(lines) and result.stderr == ""
    return found


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_help_has_one_example_of_this_command(without_torch: dict[str, Any], command: tuple[str, ...]) -> None:
    status, out = without_torch["said"][f"{' '.join(command)} --help"]
    assert status == 0
    text = " ".join(out.split())
    assert text.count("Example:") == 1
    assert f"Example: mmscale {' '.join(command)} " in text
    assert "--json" in text


def test_contract_names_all_commands() -> None:
    expected = (
        "config check, config explain, data prepare, data inspect, plan, train, eval, verify-layout, report, doctor"
    )
    assert {" ".join(command) for command in commands()} >= {*expected.split(", "), "bench step", "bench data"}


def test_starts_without_torch(without_torch: dict[str, Any]) -> None:
    assert without_torch["heavy"] == []
    assert {status for status, _ in without_torch["said"].values()} == {0}


def test_every_command_starts_without_reading_a_configuration() -> None:
    """`mmscale --help`: 0.07 s; 0.24 s with pydantic, YAML and the schema."""
    program = (
        "import sys\nfrom mmscale.cli import main\nstatus = main(['--help'])\n"
        "heavy = [name for name in ('pydantic', 'yaml', 'mmscale.config', 'mmscale.plan') if name in sys.modules]\n"
        "sys.stderr.write(repr((status, heavy)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert result.stderr == "(0, [])"


def test_version_and_module(run: Run) -> None:
    assert run("--version") == (0, f"{__version__}\n", "")
    result = subprocess.run([sys.executable, "-m", "mmscale", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"{__version__}\n"


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UsageError, 2),
        (ConfigError, 2),
        (DataError, 3),
        (CheckpointError, 4),
        (TrainingError, 5),
        (LaunchError, 1),
    ],
)
def test_error_is_two_lines_and_its_status(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: type[MmscaleError], status: int
) -> None:
    def fail(*_: object) -> None:
        raise error("the cause", remedy="the remedy")

    monkeypatch.setattr("mmscale.config.explain.explain", fail)
    assert run("config", "explain", "optim.lr") == (status, "", "error: the cause\n  fix: the remedy\n")


def test_error_with_several_lines_is_indented(run: Run, config: Path) -> None:
    status, out, err = run("config", "check", config, "train.stepz=3", "optim.lr=fast")
    assert (status, out) == (2, "")
    first, *middle, last = err.splitlines()
    assert first == "error: override: train.stepz is not a setting"
    assert [line[:8] for line in middle] == ["  also: "]
    assert last == "  fix: did you mean `train.steps`?"


def test_error_without_remedy_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise LaunchError("rank 3 could not be started")

    monkeypatch.setattr("mmscale.config.explain.explain", fail)
    assert run("config", "explain") == (1, "", "error: rank 3 could not be started\n")


def test_debug_shows_the_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMSCALE_DEBUG", "1")
    status, _, err = run("config", "explain", "nonsense")
    assert status == 2
    assert err.startswith("Traceback")
    assert "error: nonsense is not a setting" in err


@pytest.mark.parametrize(
    ("arguments", "cause", "remedy"),
    [
        (("pla",), "No such command 'pla'", "did you mean 'plan'?"),
        (("frobnicate",), "No such command 'frobnicate'", "`mmscale --help` shows the usage"),
        (("plan", "c.yaml", "--gpuz", "3"), "No such option: --gpuz", "did you mean --gpu or --gpus?"),
        (
            ("train", "c.yaml", "--train.steps=3"),
            "No such option: --train.steps",
            "settings are written without dashes",
        ),
        (("train",), "Missing argument 'CONFIG'", "`mmscale train --help` shows the usage"),
        (("plan",), "neither CONFIG nor --data", "--data FILE.jsonl --budget 30m"),
        (("plan", "c.yaml", "--gpus", "x"), "Invalid value for '--gpus'", "`mmscale plan --help` shows the usage"),
        (("plan", "c.yaml"), "c.yaml: there is no such file", ""),
        (("eval", "runs/x@y"), "runs/x@y: 'y' after the @ is not a step", "runs/x@100"),
        (("eval", "runs/x", "--routing", "magic"), "'magic' is not a routing", "batch, causal, top1, threshold"),
        (("train", "c.yaml", "--stage", "third"), "Invalid value for '--stage'", "`mmscale train --help` shows"),
        (("data", "prepare", "--out", "d"), "neither a SPEC.yaml nor --documents", "--documents FILE.jsonl"),
        (("bench", "data", "--foo", "3"), "bench data: no such option: --foo", "it takes --"),
        (("report", "x", "--out", "x.pdf"), "a report is .html or .png", "report.html"),
        (("report", "x"), "there is no folder x", "run.dir/run.name"),
        (("data", "inspect", "x", "--split", "val"), "--split val is the split of --sample", "add --sample N"),
    ],
)
def test_wrong_use(run: Run, arguments: tuple[str, ...], cause: str, remedy: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    first, second = err.splitlines()
    assert first.startswith("error: ")
    assert cause in first
    assert second.startswith("  fix: ")
    assert remedy in second


@pytest.mark.parametrize(("out", "cause"), [("file/b.html", "file is a file"), ("d.html", "d.html is a folder")])
def test_a_report_that_cannot_be_written_is_refused_first(run: Run, out: str, cause: str) -> None:
    Path("file").write_text("")
    Path("d.html").mkdir()
    status, _, err = run("report", "x", "--out", out)
    assert (status, err.splitlines()[0]) == (2, f"error: --out {out}: {cause}")


@pytest.mark.parametrize("command", ["status", "logs", "stop", "resume"])
def test_a_missing_run_is_named_by_every_command(run: Run, command: str) -> None:
    status, _, err = run(command, "x")
    assert status == 1
    said = f"error: there is no folder x in {Path.cwd()}\n  fix: name a folder run.dir/run.name, which appears when"
    assert err.startswith(said)


def test_bad_data_is_3(run: Run) -> None:
    status, _, err = run("data", "inspect", "nowhere")
    assert (status, err.splitlines()[0]) == (3, f"error: data: there is no folder nowhere in {Path.cwd()}")


@pytest.mark.parametrize(
    ("command", "option", "file"), [("eval", "--task", "no.jsonl"), ("sample", "--image", "no.png")]
)
def test_a_missing_file_is_reported_before_anything_is_loaded(run: Run, command: str, option: str, file: str) -> None:
    """Loading torch takes seconds. There is no run either, which would be found after it."""
    more = ("--prompt", "a") if command == "sample" else ()
    status, _, err = run(command, "runs/none", option, file, *more)
    first, second = err.splitlines()
    assert (status, first.removeprefix("error: ").removeprefix("task: ")) == (
        3,
        f"{file} cannot be read: there is no such file",
    )
    assert second.startswith("  fix: ")


def test_group_without_command_shows_help_only(run: Run) -> None:
    status, out, err = run("config")
    assert status == 2
    assert "explain" in out + err
    assert "error" not in err


def test_interrupt_is_130_and_quiet(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mmscale.config.explain.explain", interrupt)
    assert run("config", "explain") == (130, "", "")


def test_reader_that_leaves_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "mmscale", "config", "explain"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    process.wait(timeout=300)
