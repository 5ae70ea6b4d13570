"""`mmscale ckpt archive|restore|reshard|average`, `show --tensor`: what they print; eval and train go on from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmscale.runs.events import read_events
from mmscale.runs.metrics import read_metrics
from tests.end_to_end.running import assert_says, mmscale

STEP = 10
TENSOR = "decoder.layers.1.experts.image.w1"


@pytest.fixture(scope="module")
def run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps of two ranks, with a checkpoint every five."""
    runs = tmp_path_factory.mktemp("archived")
    settings = [f"train.steps={STEP}", "checkpoint.every=5", "checkpoint.asynchronous=false", "train.eval_every=0"]
    ended = mmscale("train", config, f"run.dir={runs}", *settings, nproc=2)
    assert ended.status == 0, ended
    return runs / "tiny"


@pytest.fixture(scope="module")
def made(run: Path) -> Path:
    out = run.parent / "made.zarr"
    done = printed("ckpt", "archive", f"{run}@{STEP}", out)
    assert (done["path"], done["step"], done["contents"]) == (str(out), STEP, "training")
    return out


def printed(*arguments: str | Path) -> dict[str, Any]:
    ended = mmscale(*arguments, "--json")
    assert ended.status == 0, ended
    return dict(json.loads(ended.out))


def loss(run: str | Path) -> float:
    return float(printed("eval", run, "--batches", "2")["loss"])


def test_a_restored_run_is_evaluated_and_trained_on(run: Path, made: Path, config: Path, tmp_path: Path) -> None:
    """With another layout than the one that saved, and the same losses as from the checkpoint itself."""
    assert printed("ckpt", "verify", made)["whole"] is True
    restored = tmp_path / "back" / "tiny"
    assert printed("ckpt", "restore", made, restored)["origin"]["made_by"] == "restore"
    assert yaml.safe_load((restored / "config.yaml").read_text())["run"] | {"seed": 0} == {
        **yaml.safe_load((run / "config.yaml").read_text())["run"],
        "dir": str(restored.parent),
        "seed": 0,
    }
    assert printed("ckpt", "diff", f"{run}@{STEP}", restored)["equal"] is True
    assert loss(restored) == loss(f"{run}@{STEP}")
    direct = tmp_path / "direct" / "tiny"
    assert printed("ckpt", "reshard", f"{run}@{STEP}", direct, "--files", "1")["tensors"] > 20
    for folder in (restored, direct):
        more = [f"run.dir={folder.parent}", f"train.steps={STEP + 2}", "parallel.ep=1", "train.eval_every=0", "--yes"]
        ended = mmscale("train", config, *more)
        assert ended.status == 0, ended
        assert "random_state_fresh" in [event["event"] for event in read_events(folder)]
    one, other = ([row["loss"] for row in read_metrics(folder) if row["step"] > STEP] for folder in (restored, direct))
    assert len(one) == 2 and one == other


@pytest.mark.long
def test_a_mean_is_evaluated_and_trained_on_only_when_asked(run: Path, config: Path, tmp_path: Path) -> None:
    mean = tmp_path / "mean" / "tiny"
    done = printed("ckpt", "average", f"{run}@5", f"{run}@{STEP}", mean, "--ema", "0.75")
    assert done["coefficients"] == [0.75, 0.25] and done["contents"] == "weights" and done["step"] == STEP
    assert [parent["step"] for parent in done["origin"]["parents"]] == [5, STEP]
    one, other, between = (
        printed("ckpt", "show", path, "--tensor", TENSOR, "--slice", "1,3:5,0,7")["values"]
        for path in (f"{run}@5", f"{run}@{STEP}", mean)
    )
    assert between == pytest.approx([0.75 * a + 0.25 * b for a, b in zip(one, other, strict=True)], rel=1e-6)
    assert loss(mean) > 0
    more = ["train", config, f"run.dir={mean.parent}", f"train.steps={STEP + 1}", "parallel.ep=1", "train.eval_every=0"]
    refused = mmscale(*more)
    assert_says(refused, status=4, cause="lacks the optimizer's state", remedy="checkpoint.allow_missing=true")
    assert mmscale(*more, "checkpoint.allow_missing=true").status == 0
    assert "optimizer_fresh" in [event["event"] for event in read_events(mean)]


def test_values_of_a_tensor(run: Path, made: Path) -> None:
    for path in (run, made):
        found = printed("ckpt", "show", path, "--tensor", TENSOR, "--slice", "0")
        assert found["name"] == "decoder.layers.1.mlp.experts.image.w1"
        assert found["shape"] == [2, 32, 2, 64] and found["selected"] == [32, 2, 64] and found["values"] is None
        assert found["min"] < found["mean"] < found["max"] and found["not_finite"] == 0
        assert found["norm"] ** 2 == pytest.approx(32 * 2 * 64 * (found["std"] ** 2 + found["mean"] ** 2))
    text = mmscale("ckpt", "show", made, "--tensor", TENSOR, "--slice", "0,:2,0,0:3").out
    assert "[0,:2,0,0:3] = 2x3" in text and len(text.splitlines()[-1].split()) == 3
    shown = printed("ckpt", "show", made)
    assert shown["provenance"]["origin"]["made_by"] == "archive" and shown["parameters"]["image"] > 0


@pytest.mark.parametrize(
    ("arguments", "status", "cause", "remedy"),
    [
        (["show", "RUN", "--tensor", "decoder.layers.1.experts.image.w9"], 4, "has no tensor", "did you mean"),
        (["show", "RUN", "--tensor", "image.w1"], 4, "image.w1 fits 2 tensors", "more of the name"),
        (["show", "RUN", "--tensor", TENSOR, "--slice", "2"], 2, "outside of dimension 0, which has 2", "2x32x2x64"),
        (["show", "RUN", "--tensor", TENSOR, "--slice", "a"], 2, "neither an index nor a range", "0,3:7"),
        (["show", "RUN", "--tensor", TENSOR, "--slice", "0,0,0,0,0"], 2, "has 5 dimensions", "fewer"),
        (["show", "RUN", "--slice", "0"], 2, "--slice needs a tensor", "--tensor"),
        (["archive", "RUN@99", "new"], 4, "no checkpoint of step 99", "choose one of 5, 10"),
        (["archive", "missing", "new"], 4, "does not exist", "RUN@STEP"),
        (["archive", "RUN", "RUN"], 4, "exists already", "does not exist"),
        (["restore", "missing", "new"], 4, "does not exist", "ckpt archive"),
        (["restore", "MADE", "RUN"], 4, "has checkpoints already", "new run folder"),
        (["reshard", "RUN", "RUN"], 4, "has checkpoints already", "new run folder"),
        (["average", "RUN", "new"], 2, "needs two checkpoints", "RUN@100"),
        (["average", "RUN@5", "RUN@10", "new", "--ema", "1.5"], 2, "1.5 is no decay", "between 0 and 1"),
    ],
)
def test_errors(
    run: Path, made: Path, tmp_path: Path, arguments: list[str], status: int, cause: str, remedy: str
) -> None:
    places = {"RUN": run, "MADE": made, "new": tmp_path / "new", "missing": tmp_path / "missing"}
    named = [argument.partition("@") for argument in arguments]
    ended = mmscale("ckpt", *(f"{places.get(name, name)}{at}{step}" for name, at, step in named))
    assert_says(ended, status=status, cause=cause, remedy=remedy)
    assert not (tmp_path / "new").exists()
