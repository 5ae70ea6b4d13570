"""From a finished run to honest numbers: the auxiliary stage, killed and gone on with, and `mmscale eval --routing`."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mmscale.runs.metrics import read_metrics
from tests.end_to_end.running import Ended, assert_says, change_settings, mmscale, start, undocumented

STAGE_STEPS = 100  # long enough to be killed in between
STAGE = (
    f"auxiliary.steps={STAGE_STEPS}",
    "auxiliary.optim.lr=1e-2",
    "auxiliary.calibration_batches=2",
    "auxiliary.checkpoint_every=20",
)


@dataclass(frozen=True)
class Staged:
    """A run with routers."""

    folder: Path
    command: tuple[str | Path, ...]
    ended: Ended

    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "auxiliary" / "report.json").read_text())
        return found


@pytest.fixture(scope="module")
def main_run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without routers; it keeps averaged cut-offs."""
    runs = tmp_path_factory.mktemp("main")
    ended = mmscale("train", config, f"run.dir={runs}", *MAIN, nproc=2)
    assert ended.status == 0, ended
    return runs / "tiny"


MAIN = ("model.experts.threshold_decay=0.9", "train.steps=12", "checkpoint.every=6", "checkpoint.asynchronous=false")


def _command(config: Path, runs: Path) -> tuple[str | Path, ...]:
    return ("train", config, f"run.dir={runs}", *MAIN, "--stage", "auxiliary", *STAGE)


@pytest.fixture(scope="module")
def staged(config: Path, main_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Staged:
    """The stage in one go, on two ranks."""
    runs = tmp_path_factory.mktemp("staged")
    shutil.copytree(main_run, runs / "tiny")
    command = _command(config, runs)
    return Staged(runs / "tiny", command, mmscale(*command, nproc=2))


def evaluated(run: Path, *options: str) -> dict[str, Any]:
    ended = mmscale("eval", run, "--batches", "2", "--json", *options)
    assert ended.status == 0, ended
    found: dict[str, Any] = json.loads(ended.out)
    return found


def test_the_stage_ends_with_routers_thresholds_and_a_report(staged: Staged) -> None:
    assert staged.ended.status == 0, staged.ended
    assert "held-out (batch routing)" in staged.ended.err and "held-out (causal routing)" in staged.ended.err
    records = read_metrics(staged.folder / "auxiliary")
    assert not undocumented(records)
    assert records[-1]["step"] == STAGE_STEPS and records[-1]["loss"] < records[0]["loss"]
    rows = staged.report()["routers"]
    kinds = {(row["layer"], row["kind"], row["modality"]) for row in rows}
    experts = {(layer, "experts", name) for layer in range(2) for name in ("text", "image")}
    assert kinds == experts | {(0, "depth", name) for name in ("text", "image")}
    assert all(0.5 < row["accuracy"] <= 1.0 for row in rows)
    assert (staged.folder / "auxiliary" / "checkpoints" / f"step_{STAGE_STEPS:08d}").is_dir()
    again = mmscale(*staged.command, nproc=2)
    assert again.status == 0 and "is done" in again.err, again


@pytest.mark.exhaustive
def test_a_killed_stage_goes_on_to_the_same_end(
    staged: Staged, config: Path, main_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    runs = tmp_path_factory.mktemp("killed")
    shutil.copytree(main_run, runs / "tiny")
    command = _command(config, runs)
    own = runs / "tiny" / "auxiliary"
    running = start(*command, "--nproc", "2", environ={"MMSCALE_LOG": ""})
    running.until(lambda: (own / "checkpoints" / "step_00000020").is_dir())
    os.kill(running.rank(1), signal.SIGKILL)
    assert running.end().status != 0
    resumed = mmscale(*command, nproc=2)
    assert resumed.status == 0, resumed
    found = Staged(runs / "tiny", command, resumed)
    assert found.report() == staged.report()
    wanted = read_metrics(staged.folder / "auxiliary")[-1]
    last = read_metrics(own)[-1]
    assert {key: last[key] for key in ("step", "loss", "grad_norm", "lr")} == {
        key: wanted[key] for key in ("step", "loss", "grad_norm", "lr")
    }


def test_every_routing_is_evaluated_and_says_so(staged: Staged) -> None:
    found = {mode: evaluated(staged.folder, "--routing", mode) for mode in ("batch", "causal", "top1", "threshold")}
    for mode, values in found.items():
        assert values["sees_later_tokens"] is (mode == "batch")
        assert values["routing"] == mode and "accuracy/digit" in values and "perplexity/text" in values
        if mode != "batch":
            assert values["batch"]["loss"] == found["batch"]["loss"]
            assert values["gap"]["loss"] == pytest.approx(values["loss"] - found["batch"]["loss"])
    assert len({values["loss"] for values in found.values()}) == 4, "modes that do the same"
    assert {row["kind"] for row in found["causal"]["routers"]} == {"experts", "depth"}
    text = mmscale("eval", staged.folder, "--batches", "1", "--routing", "causal").out.splitlines()
    assert {line.split()[-1] for line in text if line.startswith("loss")} == {"causal", "batch"}


@pytest.mark.long
def test_every_source_of_a_blend_has_its_own_numbers(staged: Staged, digits: Path, tmp_path: Path) -> None:
    run, half = tmp_path / "tiny", tmp_path / "again"
    shutil.copytree(staged.folder, run)
    shutil.copytree(digits, half)
    blend = {"path": None, "blend": [{"path": str(digits)}, {"path": str(half), "weight": 2.0}]}
    change_settings(run, lambda settings: settings["data"].update(blend))
    found = evaluated(run, "--routing", "causal")
    own = [found[f"source/{folder.name}/loss"] for folder in (digits, half)]
    assert own[0] == own[1] == evaluated(staged.folder, "--routing", "causal")["loss"]
    assert found[f"source/{half.name}/perplexity/image"] == pytest.approx(
        math.exp(found[f"source/{half.name}/loss/image"])
    )


def test_an_older_checkpoint_has_no_routers(staged: Staged) -> None:
    ended = mmscale("eval", f"{staged.folder}@6", "--routing", "causal")
    assert_says(ended, status=2, cause="no auxiliary routers for step 6", remedy="--stage auxiliary")


def test_what_cannot_be_evaluated_or_trained_is_said(
    config: Path, main_run: Path, staged: Staged, tmp_path: Path
) -> None:
    ended = mmscale("eval", main_run, "--routing", "top1")
    assert_says(ended, status=2, cause="--routing top1: there are no auxiliary routers", remedy="--stage auxiliary")
    nothing = mmscale("train", config, f"run.dir={tmp_path}", "--stage", "auxiliary", nproc=2)
    assert_says(nothing, status=4, cause="no committed checkpoint", remedy="mmscale train")
    wider = mmscale(*staged.command, "model.auxiliary.width=3", nproc=2)
    assert_says(wider, status=4, cause="routers of width", remedy="restore the width")
    more = tmp_path / "tiny"
    shutil.copytree(staged.folder, more)
    shutil.rmtree(more / "checkpoints" / "step_00000012")
    other = mmscale(*staged.command, f"run.dir={tmp_path}", nproc=2)
    assert_says(other, status=4, cause="routers for step 12 of the main run", remedy="remove .*auxiliary")


@pytest.mark.long
def test_a_joint_run_prints_both_losses_and_is_causal_without_a_stage(config: Path, tmp_path: Path) -> None:
    ended = mmscale(
        "train", config, f"run.dir={tmp_path}", *MAIN, "model.auxiliary.mode=joint", "auxiliary.optim.lr=1e-2", nproc=2
    )
    assert ended.status == 0, ended
    for mode in ("batch", "causal", "threshold"):
        assert f"held-out ({mode} routing)" in ended.err
    last = read_metrics(tmp_path / "tiny")[-1]
    assert {"eval/loss", "eval/causal/loss", "eval/threshold/loss/text"} <= last.keys()
    found = evaluated(tmp_path / "tiny", "--routing", "causal")
    assert found["routing"] == "causal" and found["routers"]
    settings = (*MAIN, "model.auxiliary.mode=joint", "auxiliary.steps=3", "auxiliary.calibration_batches=1")
    stage = mmscale("train", config, f"run.dir={tmp_path}", *settings, "--stage", "auxiliary", nproc=2)
    assert stage.status == 0, stage
    first = read_metrics(tmp_path / "tiny" / "auxiliary")[0]
    assert first["loss"] < math.log(2) - 0.005, "the stage did not go on from what the main run taught the routers"
    assert evaluated(tmp_path / "tiny", "--routing", "causal")["loss"] != found["loss"]
