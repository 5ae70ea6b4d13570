"""Validation sets of their own (`data.validation`): evaluated by name in every layout, stage and command."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mmscale.checkpoint.layout import Store
from mmscale.data.manifest import MANIFEST
from mmscale.train.held_out import HeldOut
from mmscale.train.metrics import read_metrics
from tests.end_to_end.running import Ended, mmscale, undocumented

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "dp": (2, ()),
    "tp": (2, ("parallel.tp=2",)),
    "pp": (2, ("parallel.pp=2",)),
    "ep": (2, ("parallel.ep=2",)),
}
TRAIN = (
    "optim.warmup=1",
    "train.eval_every=0",
    "train.eval_batches=2",
    "checkpoint.every=0",
    "checkpoint.asynchronous=false",
)


@dataclass(frozen=True)
class Sets:
    """Copies of the digits.

    Attributes:
        same: holds the held-out documents, all to be read.
        seen: holds out what others train on.
        silent: holds nothing out.
    """

    same: Path
    seen: Path
    silent: Path

    @property
    def settings(self) -> str:
        return f"data.validation={{same: {self.same}, seen: {self.seen}}}"


@pytest.fixture(scope="module")
def sets(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Sets:
    folder = tmp_path_factory.mktemp("sets")
    splits = json.loads((digits / MANIFEST).read_text())["splits"]
    nothing: dict[str, Any] = {"parts": []}
    changed = {
        "same": {"train": splits["validation"], "validation": nothing},
        "seen": {"train": nothing, "validation": splits["train"]},
        "silent": {"train": splits["train"], "validation": nothing},
    }
    for name, content in changed.items():
        shutil.copytree(digits, folder / name)
        change(folder / name, splits=content, tasks=[])
    return Sets(*(folder / name for name in changed))


def change(folder: Path, **content: Any) -> None:
    file = folder / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | content))


def train(config: Path, runs: Path, *arguments: str, nproc: int = 1) -> Ended:
    settings = (f"run.dir={runs}", "model.auxiliary.mode=joint", *TRAIN)
    ep = () if any("parallel.ep" in text for text in arguments) else ("parallel.ep=1",)
    ended = mmscale("train", config, *settings, *ep, *arguments, nproc=nproc)
    assert ended.status == 0, ended
    return ended


@pytest.fixture(scope="module")
def alone(config: Path, sets: Sets, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """A joint run of one process."""
    runs = tmp_path_factory.mktemp("alone")
    ended = train(config, runs, sets.settings, "train.steps=2", "log.tensorboard=true")
    return runs / "tiny", ended


def held_out(run: Path) -> dict[str, float]:
    return {key: value for key, value in read_metrics(run)[-1].items() if HeldOut.of(key) is not None}


def by_set(values: dict[str, float], name: str) -> dict[str, float]:
    """Figures of a set by routing and figure."""
    found = {key: HeldOut.of(key) for key in values}
    return {f"{one.routing} {one.figure}": values[key] for key, one in found.items() if one and one.name == name}


def test_each_is_reported_by_name(alone: tuple[Path, Ended], sets: Sets, tmp_path: Path) -> None:
    """In lines, metrics.jsonl, TensorBoard and the report; the same documents have the same losses."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, ended = alone
    values = held_out(run)
    assert undocumented(read_metrics(run)) == set()
    main = by_set(values, "")
    assert {"batch loss", "batch loss/image", "causal loss/text"} <= main.keys()
    assert by_set(values, "same") == main
    assert by_set(values, "seen").keys() == main.keys() and by_set(values, "seen") != main
    assert f"validation same: {sets.same}, 180 documents, all that it has" in ended.err or "same:" in ended.err
    for name in ("held-out", "validation same", "validation seen"):
        for routing in ("batch", "causal"):
            assert f"step 2: {name} ({routing} routing)  loss " in ended.err, ended.err
    shown = EventAccumulator(str(run / "tensorboard"))
    shown.Reload()
    assert values.keys() <= set(shown.Tags()["scalars"])
    assert mmscale("report", run, "--out", tmp_path / "report.html", "--no-png").status == 0
    page = (tmp_path / "report.html").read_text()
    assert "Validation seen: loss per token" in page and "validation same (causal routing)" in page


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(layout: str, alone: tuple[Path, Ended], config: Path, sets: Sets, tmp_path: Path) -> None:
    nproc, settings = LAYOUTS[layout]
    train(config, tmp_path, sets.settings, "train.steps=2", *settings, nproc=nproc)
    assert held_out(tmp_path / "tiny") == pytest.approx(held_out(alone[0]), rel=1e-5)


def test_evaluation_stage_and_resume(alone: tuple[Path, Ended], config: Path, sets: Sets, tmp_path: Path) -> None:
    """`eval` gives what training gave; the stage reports each set; a set that was replaced is announced."""
    run = Path(shutil.copytree(alone[0], tmp_path / "tiny"))
    found = json.loads(mmscale("eval", run, "--routing", "causal", "--batches", "2", "--json").out)
    values = held_out(run)
    for name in ("", "same", "seen"):
        prefix = f"validation/{name}/" if name else ""
        for figure in ("loss", "loss/text", "loss/image"):
            causal, batch = (values[HeldOut(figure, routing, name).key] for routing in ("causal", "batch"))
            assert found[f"{prefix}{figure}"] == pytest.approx(causal, rel=1e-6)
            assert found["batch"][f"{prefix}{figure}"] == pytest.approx(batch, rel=1e-6)
            assert found["gap"][f"{prefix}{figure}"] == pytest.approx(causal - batch, abs=1e-6)
    other = json.loads(mmscale("eval", run, "--data", sets.seen, "--batches", "2", "--json").out)
    assert other["loss"] == pytest.approx(values["eval/validation/seen/loss"], rel=1e-6)
    assert not any("validation/" in key for key in other)

    stage = ("--stage", "auxiliary", "auxiliary.steps=2", "auxiliary.calibration_batches=0")
    ended = train(config, tmp_path, sets.settings, "train.steps=2", *stage)
    report = json.loads((run / "auxiliary" / "report.json").read_text())
    assert report["validation"].keys() == {"same", "seen"} and report["validation"]["same"] == report["held_out"]
    assert report["held_out"]["batch"]["loss"] == pytest.approx(values["eval/loss"], rel=1e-6)
    assert "validation seen (causal routing)  loss " in ended.err

    kept = {one["name"]: one for one in Store.of_run(run).info(2)["validation"]}
    assert kept.keys() == {"same", "seen"} and kept["seen"]["path"] == str(sets.seen)
    places = {name: Path(shutil.copytree(getattr(sets, name), tmp_path / name)) for name in ("same", "seen")}
    change(places["seen"], source="other documents")
    moved = f"data.validation={{same: {places['same']}, seen: {places['seen']}}}"
    ended = train(config, tmp_path, moved, "train.steps=3", nproc=2)
    assert "data.validation.seen holds other documents: its losses do not go on" in ended.err
    assert "data.validation.same holds" not in ended.err and f'"{places["same"]}"' in ended.err


def test_sources_need_no_held_out_documents(config: Path, sets: Sets, tmp_path: Path) -> None:
    settings = (f"data.path={sets.silent}", f"data.validation.same={sets.same}")
    ended = train(config, tmp_path, *settings, "train.steps=2", "train.eval_every=1", "train.eval_batches=1")
    assert "step 1: validation same (batch routing)" in ended.err and "held-out" not in ended.err
    assert {HeldOut.of(key).name for key in held_out(tmp_path / "tiny")} == {"same"}  # type: ignore[union-attr]
    found = json.loads(mmscale("eval", tmp_path / "tiny", "--routing", "causal", "--batches", "1", "--json").out)
    assert found["routers"] and "loss" not in found
    assert found["validation/same/loss"] == pytest.approx(
        read_metrics(tmp_path / "tiny")[-1]["eval/validation/same/causal/loss"]
    )


def test_an_export_is_evaluated_on_them(exported: Path, sets: Sets, tmp_path: Path) -> None:
    export = Path(shutil.copytree(exported / "tiny-hf", tmp_path / "hf"))
    content = json.loads((export / "config.json").read_text())
    content["mmscale"]["config"]["data"]["validation"] = {"same": str(sets.same)}
    (export / "config.json").write_text(json.dumps(content))
    (export / "MANIFEST.json").unlink()  # changed on purpose
    ended = mmscale("eval", export, "--batches", "2", "--json")
    assert ended.status == 0, ended
    found = json.loads(ended.out)
    assert found["validation/same/loss"] == found["loss"]
    assert found["validation/same/perplexity/text"] == found["perplexity/text"]
