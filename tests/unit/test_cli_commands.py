# ruff: noqa: F401, F811  fixtures of another file
"""What commands of the command line pass on, and what they print. What they compute is tested elsewhere."""

from __future__ import annotations

import importlib
import inspect
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmscale.cli import ranks
from mmscale.cli.bench import HOMES, documented_options, split_options
from mmscale.cli.named_files import split_step
from mmscale.cli.stage import StageName
from mmscale.errors import (
    MmscaleError,
    UsageError,
)
from mmscale.resilience.lease import owner
from mmscale.runtime.activity import ActivityReporter
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.stages.table import STAGES, Stage
from mmscale.train.training_lock import Claim
from tests.unit.test_cli import Run, config, run

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
    assert "1 document, see rejected.jsonl" in out
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
def test_eval_writes_the_routing_beside_every_number_if_the_model_routes(
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
    assert all((line.split()[-1] == "batch") is sees_later_tokens for line in numbers)
    assert ("routing" in out) is sees_later_tokens
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


@pytest.mark.parametrize(
    ("checkpoint", "cause", "remedy"),
    [
        (None, "there is no folder", "name another"),
        ("{}", "no checkpoint of this run is known to be the best one", "train with checkpoint.keep_best=eval/loss"),
        ("{keep_best: null}", "known to be the best one", "train with checkpoint.keep_best=eval/loss"),
        ("{keep_best: eval/loss/image}", "has saved none after an evaluation of eval/loss/image", "wait for one"),
        ("[", "known to be the best one", "train with checkpoint.keep_best=eval/loss"),
    ],
)
def test_a_best_checkpoint_that_is_missing(checkpoint: str | None, cause: str, remedy: str, tmp_path: Path) -> None:
    """The advice is not what the run has already."""
    run = tmp_path / "own"
    if checkpoint is not None:
        run.mkdir()
        (run / "config.yaml").write_text(f"checkpoint: {checkpoint}\n")
    with pytest.raises(MmscaleError) as caught:
        split_step(f"{run}@best")
    assert cause in caught.value.cause and remedy in (caught.value.remedy or "")


def test_split_step() -> None:
    assert split_step("runs/x") == (Path("runs/x"), None)
    assert split_step("runs/x@100") == (Path("runs/x"), 100)
    assert split_step("a@b/x") == (Path("a@b/x"), None)


@pytest.mark.parametrize("name", HOMES)
def test_the_help_of_a_benchmark_lists_its_options(name: str, run: Run) -> None:
    """All that `run` takes, each with a meaning; they come from the source, without an import of torch."""
    found = documented_options(HOMES[name])
    takes = inspect.signature(importlib.import_module(HOMES[name]).run).parameters.values()
    names = [
        f"--{one.name.replace('_', '-')}" for one in takes if one.kind is one.KEYWORD_ONLY and one.name != "config"
    ]
    assert [option.split()[0] for option in found] == names and all(found.values())
    _, out, _ = run("bench", name, "--help")
    assert all(option in " ".join(out.split()) for option in found)


def test_a_wheel_has_no_benchmarks_to_list() -> None:
    assert documented_options("mmscale.bench.nothing") == {}


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
