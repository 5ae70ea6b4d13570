"""What a user sees of a damaged checkpoint, of a changed objective, and of a run of which nothing whole is left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mmscale.runs.events import read_events
from tests.end_to_end.running import assert_says, listing, mmscale

SETTINGS = ("train.eval_every=0", "train.eval_batches=1", "optim.warmup=1", "parallel.ep=1", "checkpoint.every=1")


@pytest.fixture(scope="module")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of one process, with two checkpoints."""
    runs = tmp_path_factory.mktemp("trained")
    ended = mmscale("train", config, f"run.dir={runs}", "train.steps=2", *SETTINGS)
    assert ended.status == 0, ended
    return runs


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "runs"))


def damage(runs: Path, step: int) -> None:
    file = runs / "tiny" / "checkpoints" / f"step_{step:08d}" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def test_training_takes_the_one_before_and_says_so_once(runs: Path, config: Path) -> None:
    damage(runs, 2)
    before = listing(runs)
    assert_says(mmscale("eval", runs / "tiny"), status=4, cause="step_00000002 is damaged: __0_0", remedy="RUN@STEP")
    ended = mmscale("sample", runs / "tiny", "--prompt", "a", "--out", runs / "drawings")
    assert_says(ended, status=4, cause="step_00000002 is damaged: __0_0", remedy="RUN@STEP")
    assert listing(runs) == before  # looking renames nothing
    assert mmscale("eval", f"{runs / 'tiny'}@1", "--batches", "1").status == 0
    ended = mmscale("train", config, f"run.dir={runs}", "train.steps=3", *SETTINGS)
    assert ended.status == 0, ended
    (warning,) = (line for line in ended.err.splitlines() if "warning" in line)
    assert "step 2 is damaged, kept as step_00000002.bad: __0_0.distcp has another content" in warning
    assert "resumes after step 1 of 3" in ended.err
    assert "changed since the checkpoint: train.steps: 2 -> 3" in ended.err
    (event,) = (event for event in read_events(runs / "tiny") if event["event"] == "checkpoint_bad")
    assert event["step"] == 2 and event["problems"] == ["__0_0.distcp has another content than what was written"]
    verified = mmscale("ckpt", "verify", runs / "tiny")
    assert verified.status == 0 and "step 3: intact" in verified.out


def test_nothing_whole_is_left(runs: Path, config: Path) -> None:
    damage(runs, 1)
    damage(runs, 2)
    for _ in range(2):
        ended = mmscale("train", config, f"run.dir={runs}", "train.steps=3", *SETTINGS)
        assert_says(ended, status=4, cause="no checkpoint in .* is whole", remedy="start from scratch")
    assert not (runs / "tiny/checkpoints/step_00000003").exists()


def test_a_changed_objective_needs_a_yes(runs: Path, config: Path) -> None:
    command = ("train", config, f"run.dir={runs}", "train.steps=3", "train.z_loss=0.1", "optim.lr=1e-3", *SETTINGS)
    before = listing(runs)
    ended = mmscale(*command)
    assert_says(ended, status=2, cause=r"objective or the data .*train\.z_loss: 1e-05 -> 0\.1", remedy="--yes")
    assert "optim.lr" not in ended.err and listing(runs) == before
    ended = mmscale(*command, "--yes")
    assert ended.status == 0, ended
    changed = [line for line in ended.err.splitlines() if line.startswith("changed since")]
    assert changed[0].endswith("train.z_loss: 1e-05 -> 0.1") and any("optim.lr: 0.003 -> 0.001" in x for x in changed)


def test_show_counts_the_parameters_that_the_plan_promises(trained: Path) -> None:
    shown = json.loads(mmscale("ckpt", "show", trained / "tiny", "--json").out)["parameters"]
    planned = json.loads(mmscale("plan", trained / "tiny" / "config.yaml", "--json").out)["parameters"]
    assert shown["total"] == planned["total"]
    assert {name: shown[name] for name in ("text", "image")} == planned["per_modality"]
