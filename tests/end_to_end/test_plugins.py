"""Plug-ins of a package outside the tree: trained with on two ranks, resumed, dry-run by the launcher, evaluated.

Rows are generated from the table of kinds; what each plug-in did is read from the files of the run.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import record as records
from launch.profile import load_profile
from mmscale.checkpoint.layout import Store
from mmscale.config.load import load
from mmscale.tables.plugins import PLUGINS
from tests.end_to_end.running import Ended, assert_says, mmscale, undocumented
from tests.plugins import NAMED, PACKAGE, TRAINED, install, setting

ARGS = {"hook": "{factor: 1e-3}", "sink": "{keys: [loss, lr, hooks/loss_spikes]}", "loss": "{gamma: 1}"}
STEPS = ("train.eval_every=4", "train.dry_run=false", "checkpoint.every=4", "optim.warmup=0")


def everything(*, by: int) -> list[str]:
    """All kinds at once; by: 0, import path; 1, entry point."""
    return [text for kind in TRAINED for text in setting(kind, NAMED[kind][by], ARGS.get(kind, "{}"))]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = install(tmp_path / "site")
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture(scope="module")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps with every kind of plug-in, named by entry point, on two ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(install(tmp_path_factory.mktemp("site"))))
        runs = tmp_path_factory.mktemp("plugged")
        ended = train(config, runs, *everything(by=1), "train.steps=4")
        assert ended.status == 0, ended
        return runs


def train(config: Path, runs: Path, *more: str) -> Ended:
    return mmscale("train", config, f"run.dir={runs}", *STEPS, *more, nproc=2)


def record_launch(run: Path) -> None:
    """What `mmscale launch` leaves in the folder of a run."""
    config = load(run / "config.yaml", [f"run.dir={run.parent}"], recorded=True)
    profile = load_profile("local")
    record = records.plan_record(config, cluster="local", profile=profile, nodes=1, tasks_per_node=2)
    records.write_record(record, config)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_kind_did_its_work(trained: Path) -> None:
    run = trained / "tiny"
    steps = [line for line in lines(run / "metrics.jsonl") if "lr" in line]
    peak = max(line["lr"] for line in steps)
    assert steps[0]["lr"] < peak == pytest.approx(3e-3, rel=0.2), "one cycle rises; cosine would not"
    assert [line["hooks/loss_spikes"] for line in steps] == [0, 1, 2, 3], "a factor of 0.001: every loss is a spike"
    assert len([one for one in lines(run / "events.jsonl") if one["event"] == "loss_spike"]) == 3
    rows = list(csv.DictReader((run / "figures.csv").open()))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4]
    assert [float(row["loss"]) for row in rows] == pytest.approx([line["loss"] for line in steps])
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["optim"]["optimizer"] == NAMED["optimizer"][1] and saved["train"]["loss"] == NAMED["loss"][1]


def test_a_resumed_run_goes_on_as_one_that_was_not_interrupted(
    config: Path, trained: Path, installed: Path, tmp_path: Path
) -> None:
    """Named by import path the second time: the loss has another name, which is asked about."""
    shutil.copytree(trained / "tiny", tmp_path / "tiny")
    asked = train(config, tmp_path, *everything(by=0), "train.steps=8")
    assert asked.status == 2 and "train.loss" in asked.err
    ended = train(config, tmp_path, *everything(by=0), "train.steps=8", "--yes")
    assert ended.status == 0, ended
    assert "spikes of the loss in 8 steps" in ended.out + ended.err
    rows = list(csv.DictReader((tmp_path / "tiny" / "figures.csv").open()))
    assert [(int(row["attempt"]), int(row["step"])) for row in rows[4:]] == [(2, step) for step in range(5, 9)]
    assert Store.of_run(tmp_path / "tiny").newest() == 8


@pytest.mark.parametrize("kind", TRAINED)
def test_a_resume_without_the_package_says_what_is_missing(
    kind: str, config: Path, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained / "tiny", tmp_path / "tiny")
    before = sorted(file.name for file in (tmp_path / "tiny").iterdir())
    for command in (("train",), ("launch", "--cluster", "local", "--dry-run")):
        plugged = setting(kind, NAMED[kind][0])
        ended = mmscale(
            command[0], config, f"run.dir={tmp_path}", *STEPS, *plugged, "train.steps=8", "parallel.ep=1", *command[1:]
        )
        assert ended.status == 2, ended
        assert f"{PLUGINS[kind].settings[0]}: there is no module moma_plugins here" in ended.err
    assert sorted(file.name for file in (tmp_path / "tiny").iterdir()) == before


# Commands that read a run, each with its exit status and what it says. {run} is the folder, {out} may be written to.
READERS = {
    "status": ("status {run}", 0, "tiny"),
    "logs": ("logs {run}", 0, "step"),
    "report": ("report {run} --out {out}.html --no-png", 0, "wrote"),
    "compare": ("compare {run} {run}", 2, "there is nothing to compare"),
    "eval": ("eval {run} --batches 1", 0, "perplexity"),
    "sample": ("sample {run} --prompt draw --count 1 --out {out}", 0, "drew 1 image "),
    "plan": ("plan {run}/config.yaml", 0, "note: optim.schedule is 'one_cycle'.*the plan needs no plug-in"),
    "ckpt list": ("ckpt list {run}", 0, "2 ranks"),
    "ckpt show": ("ckpt show {run}@4", 0, "parameters"),
    "ckpt verify": ("ckpt verify {run}@4", 0, "intact"),
    "ckpt diff": ("ckpt diff {run}@4 {run}@4", 0, "are equal"),
    "ckpt prune": ("ckpt prune {run} --keep 2", 0, "kept"),
    "ckpt average": ("ckpt average {run}@4 {run}@4 {out}", 0, "wrote"),
    "ckpt archive": ("ckpt archive {run}@4 {out}", 0, "wrote"),
    "ckpt reshard": ("ckpt reshard {run}@4 {out}", 0, "wrote"),
    "convert to-hf": ("convert to-hf {run} {out}", 4, "has no auxiliary routers"),
}
# Those that train, or say whether one can.
TRAINERS = {
    "train": "train {run}/config.yaml",
    "dry run": "launch {run}/config.yaml --cluster local --dry-run",
    "resume": "resume {run}",
    "config check": "config check {run}/config.yaml",
}


# One row for each place that loads what a run recorded; the other commands go through one of these places.
ALWAYS = ("status", "report", "compare", "eval", "plan", "ckpt show", "ckpt prune")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ALWAYS else pytest.mark.exhaustive) for n in READERS]
)
def test_reading_a_run_needs_no_plugin(name: str, trained: Path, tmp_path: Path) -> None:
    command, status, words = READERS[name]
    shutil.copytree(trained / "tiny", tmp_path / "tiny")
    ended = mmscale(*command.format(run=tmp_path / "tiny", out=tmp_path / "out").split())
    assert ended.status == status and re.search(words, ended.out + ended.err), ended


@pytest.mark.parametrize("name", TRAINERS)
def test_training_needs_its_plugins(name: str, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(trained / "tiny", run)
    if name == "resume":  # of a run that was launched, with its configuration
        record_launch(run)
    ended = mmscale(*TRAINERS[name].format(run=run).split())
    assert_says(ended, status=2, cause="is '.*', wants .* an installed plug-in", remedy="install the package")


def test_evaluation_needs_no_plugin(trained: Path) -> None:
    """Held-out losses are cross entropy, and are those that training measured."""
    ended = mmscale("eval", trained / "tiny", "--batches", "2", "--json", nproc=2)
    assert ended.status == 0, ended
    measured = [line["eval/loss"] for line in lines(trained / "tiny" / "metrics.jsonl") if "eval/loss" in line]
    assert json.loads(ended.out)["loss"] == pytest.approx(measured[-1], rel=1e-6)


@pytest.mark.parametrize("by", [0, 1], ids=["path", "entry point"])
@pytest.mark.parametrize("kind", TRAINED)
def test_the_launcher_accepts_what_ranks_can_use(
    kind: str, by: int, config: Path, installed: Path, tmp_path: Path
) -> None:
    plugged = setting(kind, NAMED[kind][by], ARGS.get(kind, "{}"))
    ended = mmscale("launch", config, f"run.dir={tmp_path}", *plugged, "--cluster", "local", "--dry-run")
    assert ended.status == 0, ended


def test_keys_of_hooks_are_documented(trained: Path) -> None:
    assert undocumented(lines(trained / "tiny" / "metrics.jsonl")) == set()


def test_a_task_measures_a_run_and_says_so(trained: Path, installed: Path) -> None:
    path, name = NAMED["task"]
    ended = mmscale("eval", trained / "tiny", "--batches", "1", "--task", name, "--json")
    assert ended.status == 0, ended
    assert json.loads(ended.out)["task/minimal_pairs"] in (0.0, 0.5, 1.0)
    wrong = mmscale("eval", trained / "tiny", "--task", f"{path}X")
    assert wrong.status == 2 and "--task: moma_plugins.task has no MinimalPairsX" in wrong.err


def test_a_classifier_of_ones_own_judges_drawings(trained: Path, installed: Path) -> None:
    """The model draws by way of the task; the same seed draws the same."""
    command = ("eval", trained / "tiny", "--batches", "1", "--task", f"{PACKAGE}.drawn:DrawnClasses", "--json")
    found = [json.loads(mmscale(*command).out)["task/drawn_classes"] for _ in range(2)]
    assert found[0] == found[1] and found[0] * 8 in range(9)
