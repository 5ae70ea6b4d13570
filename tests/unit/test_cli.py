# The command line: help, JSON, the two lines of an error, exit status. What commands compute is tested elsewhere.
"""Tests of mmscale.cli."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from mmscale import __version__
from mmscale.cli import app, main, ranks
from mmscale.cli.bench import split_options
from mmscale.cli.named_files import split_step
from mmscale.cli.stage import StageName
from mmscale.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LaunchError,
    MmscaleError,
    TrainingError,
    UsageError,
)
from mmscale.resilience.lease import owner
from mmscale.runtime.activity import ActivityReporter
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.stages.table import STAGES, Stage
from mmscale.train.training_lock import Claim
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
    assert err.startswith("error: there is no folder x\n  fix: name a folder run.dir/run.name, which appears when")


def test_bad_data_is_3(run: Run) -> None:
    status, _, err = run("data", "inspect", "nowhere")
    assert (status, err.splitlines()[0]) == (3, "error: data: there is no folder nowhere")


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


# --- commands -------------------------------------------------------------------------------------------------------


def test_config_check(run: Run, config: Path) -> None:
    status, out, _ = run("config", "check", config, "train.steps=30", "--json")
    result = json.loads(out)
    assert status == 0
    assert result["config"]["train"]["steps"] == 30
    assert result["origins"]["train.steps"] == "override"
    assert result["origins"]["run.name"].endswith("tiny.yaml:2")
    _, text, _ = run("config", "check", config)
    assert any(line.split() == ["run.name", "tiny", f"{config}:2"] for line in text.splitlines())


def test_config_explain(run: Run) -> None:
    assert json.loads(run("config", "explain", "train.steps", "--json")[1])["unit"] == "steps"
    text = run("config", "explain", "model.num_layers")[1]
    assert "none, it is required" in text
    assert "train.micro_batch_size" in run("config", "explain")[1]


def test_plan(run: Run, config: Path) -> None:
    status, out, _ = run("plan", config, "--gpus", 4, "--gpu-memory", 80, "--json")
    result = json.loads(out)
    assert status == 0
    assert result["parameters"]["total"] > result["parameters"]["active"]
    assert result["gpus"] == 4
    assert "parameters" in run("plan", config)[1]


def test_data_prepare_and_inspect(run: Run, tmp_path: Path) -> None:
    lines = [json.dumps({"id": str(n), "content": [{"type": "text", "text": f"a red bus {n}"}]}) for n in range(4)]
    Path("f.jsonl").write_text("\n".join([*lines, "{broken"]) + "\n")
    status, out, err = run("data", "prepare", "--documents", "f.jsonl", "--out", "set", "--workers", 1, "--json")
    assert (status, err) == (0, "")
    result = json.loads(out)
    assert sum(split["documents"] for split in result["splits"].values()) == 4
    assert result["rejected"] == 1
    status, out, _ = run("data", "inspect", "set")
    assert status == 0
    assert "1 documents, see rejected.jsonl" in out
    drawn = json.loads(run("data", "inspect", "set", "--sample", 0, "--json")[1])
    assert "a red bus" in drawn["text"]
    status, _, err = run("data", "prepare", "--documents", "f.jsonl", "--out", "other", "--strict")
    assert status == 3
    assert "broken JSON" in err


def test_settings_may_stand_where_the_spec_would(run: Run) -> None:
    status, _, err = run(
        "data", "prepare", "data.prepare.source=megatron", "data.prepare.image.kind=levels", "--out", "set"
    )
    assert status == 2
    assert "vocab.modalities" in err


@pytest.mark.parametrize("sees_later_tokens", [True, False])
def test_eval_writes_the_routing_beside_every_number(
    run: Run, monkeypatch: pytest.MonkeyPatch, sees_later_tokens: bool
) -> None:
    seen: dict[str, Any] = {}

    def evaluate_run(folder: Path, *, at: Callable[[str], None], **options: Any) -> dict[str, Any]:
        at("batch 1 of 2")
        seen.update(options, folder=folder)
        losses = {"loss": 2.5, "loss/text": 2.0, "perplexity/text": 7.389, "accuracy/digit": 0.9}
        return losses | {"step": 300, "sees_later_tokens": sees_later_tokens}

    monkeypatch.setattr("mmscale.inference.chosen_data.check_chosen", lambda *_: None)  # the checkpoint is empty
    monkeypatch.setitem(sys.modules, "mmscale.inference.evaluate", SimpleNamespace(evaluate_run=evaluate_run))
    Path("runs/x/checkpoints/step_00000300").mkdir(parents=True)
    shutil.copytree(Path(__file__).parent / "data/golden/format_1/set", "d")
    _, out, _ = run("eval", "runs/x@300", "--data", "d", "--batches", 2)
    assert ("these numbers use the future" in out) is sees_later_tokens and "sees_later_tokens" not in out
    assert seen == {"folder": Path("runs/x"), "step": 300, "data": Path("d"), "batches": 2, "routing": "batch"}
    numbers = [line for line in out.splitlines() if line.startswith(("loss", "perplexity", "accuracy"))]
    assert len(numbers) == 4
    assert all(line.split()[-1] == "batch" for line in numbers)
    assert json.loads(run("eval", "runs/x", "--json")[1])["routing"] == "batch"


@pytest.mark.parametrize("status", [0, 75])
def test_train_ends_with_the_status_of_the_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, config: Path, status: int
) -> None:
    places: list[RankEnv] = []
    graces: list[float | None] = []

    def main(
        _config: object,
        env: RankEnv,
        *,
        stage: str,
        yes: bool,
        grace_s: float | None,
        starting: ActivityReporter,
        claim: Claim,
    ) -> int:
        places.append(env)
        graces.append(grace_s)
        assert (held := owner(Path("runs/tiny"))) is not None and held.id == claim.lease_id
        return status

    fake = SimpleNamespace(main=main)
    monkeypatch.setitem(sys.modules, "mmscale.train.run", fake)
    monkeypatch.setattr("mmscale.train.run", fake, raising=False)
    monkeypatch.setattr(Stage, "preflight", lambda *_, **__: None)  # there is no data set either
    assert run("train", config, "--json", "--grace", 90) == (
        status,
        json.dumps({"run": "runs/tiny", "exit_status": status, "last": None}) + "\n",
        "",
    )
    assert places == [RankEnv()] and graces == [90.0] and owner(Path("runs/tiny")) is None


def test_the_stage_option_names_the_stages_of_the_table(run: Run) -> None:
    assert [stage.value for stage in StageName] == list(STAGES)
    for command in ("train", "launch"):
        text = " ".join(run(command, "--help")[1].replace("│", " ").split())
        for stage in STAGES.values():
            assert f"{stage.name}: {stage.help}" in text, text


def test_train_starts_local_ranks(run: Run, monkeypatch: pytest.MonkeyPatch, config: Path) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(ranks, "run_local", lambda *arguments, **options: calls.append((arguments, options)) or 75)
    monkeypatch.setattr(sys, "argv", ["mmscale", "train", "tiny.yaml", "--nproc", "2"])
    monkeypatch.setattr("mmscale.train.stages.table.check_data", lambda settings: {})  # there is no data
    assert run("train", config, "--nproc", 2)[0] == 75
    ((arguments, options),) = calls
    assert arguments == (2, ["train", "tiny.yaml", "--nproc", "2"])
    assert options["log_dir"] == Path("runs/tiny/logs/attempt_1")
    assert options["environ"]["MMSCALE_ATTEMPT_ID"].startswith("train-")  # ranks train under this process's lease


def test_layout_that_does_not_fit_is_said_before_ranks_start(run: Run, config: Path) -> None:
    status, _, err = run("train", config, "parallel.tp=2", "--nproc", 3)
    assert status == 2
    assert "does not divide the 3 ranks" in err


@pytest.mark.parametrize(("passed", "status", "word"), [(True, 0, "equal to"), (False, 1, "NOT EQUAL")])
def test_verify_layout(
    run: Run, monkeypatch: pytest.MonkeyPatch, config: Path, passed: bool, status: int, word: str
) -> None:
    result = {"layout": {"tp": 1, "vpp": None}, "steps": 3, "loss_difference": 1e-7, "grad_norm_difference": 0.0}
    part = {"compared": 2, "worst": "decoder.w", "difference": 1e-3, "tolerance": 5e-6, "differ": ["decoder.w"]}
    result |= {"tolerance": 2e-6, "passed": passed, "gradients": part, "state": part | {"differ": []}}
    chosen = {"compared": 1536, "difference": 3 / 1536, "tolerance": 0.02}
    result["choices"] = None if passed else chosen
    fake = SimpleNamespace(verify_layout=lambda _config, *, steps: result)
    monkeypatch.setitem(sys.modules, "mmscale.train.proof.verify_layout", fake)
    monkeypatch.setattr("mmscale.train.proof.verify_layout", fake, raising=False)
    found, out, _ = run("verify-layout", config)
    assert found == status
    assert word in out
    assert "1.00e-03, decoder.w (2 tensors, tolerance 5e-06); beyond it: decoder.w" in " ".join(out.split())
    assert ("choices that differ 0.20% of 1,536 (tolerance 2%)" in " ".join(out.split())) is not passed


def test_verify_layout_starts_as_many_ranks_as_the_layout_has(
    run: Run, monkeypatch: pytest.MonkeyPatch, config: Path
) -> None:
    started: list[int] = []
    monkeypatch.setattr(ranks, "run_local", lambda nproc, *_, **__: started.append(nproc) or 5)
    assert run("verify-layout", config, "parallel.tp=2", "parallel.pp=2")[0] == 1  # a rank says 5 for "not equal"
    assert started == [4]


def test_nproc_inside_another_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks.starts_ranks(2)
    assert not ranks.starts_ranks(1)
    assert not ranks.starts_ranks(None)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(UsageError, match="already one of 8"):
        ranks.starts_ranks(2)
    monkeypatch.setenv("MMSCALE_LAUNCHER", "local")
    assert not ranks.starts_ranks(2)


def test_split_step() -> None:
    assert split_step("runs/x") == (Path("runs/x"), None)
    assert split_step("runs/x@100") == (Path("runs/x"), 100)
    assert split_step("a@b/x") == (Path("a@b/x"), None)


def test_bench_options() -> None:
    arguments = ["c.yaml", "train.steps=3", "--micro-batch-sizes", "4,8", "--repeats=2", "--lr", "-0.5", "--fast"]
    values, options = split_options("step", arguments)
    assert values == ["c.yaml", "train.steps=3"]
    assert options == {"micro_batch_sizes": (4, 8), "repeats": 2, "lr": -0.5, "fast": True}


def test_bench_calls_the_benchmark(run: Run, monkeypatch: pytest.MonkeyPatch, config: Path) -> None:
    def bench(config: Any = None, *, repeats: int = 1) -> dict[str, Any]:
        return {"name": config.run.name, "repeats": repeats, "speed": float("inf")}

    monkeypatch.setitem(sys.modules, "mmscale.bench.step", SimpleNamespace(run=bench))
    _, out, _ = run("bench", "step", config, "--repeats", 7, "--json")
    assert json.loads(out) == {"name": "tiny", "repeats": 7, "speed": "inf"}


def test_doctor(run: Run) -> None:
    status, out, _ = run("doctor", "--json")
    result = json.loads(out)
    assert status == 0
    assert result["healthy"] is True
    assert {"name", "status", "detail", "fix"} <= result["checks"][0].keys()
    assert list(Path().iterdir()) == []  # it leaves nothing behind
