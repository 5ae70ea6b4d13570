"""What differs from a checkpoint, crossed with what is done with it: right, refused in words, or only with `--yes`.

A run goes on, or its stage does, with changed settings and data; evaluation, export and drawing compute the checkpoint,
whatever the latest attempt's config.yaml says.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from mmscale.checkpoint.layout import Store
from mmscale.train.metrics import read_metrics
from tests.end_to_end.running import Ended, assert_says, change_settings, mmscale


@dataclass(frozen=True)
class Cell:
    """A change.

    Attributes:
        overrides: of the configuration; DATA stands for a copy of the data, OTHER for one with other documents.
        asks: what `train` names when it refuses without `--yes`; "": it goes on.
        says: what it prints when it goes on.
        stage: what the auxiliary stage names when it refuses; "": it goes on.
    """

    overrides: tuple[str, ...]
    asks: str = ""
    says: str = "changed since the checkpoint: "
    stage: str = ""


ORDER = "data: another order from sequence 120 on; epochs that were begun are read to their end, no document is read"
CELLS = {
    "settings": Cell(("model.rope_base=500000",), asks="model.rope_base", stage="model.rope_base"),
    "blend": Cell(
        ("data.path=null", "data.blend=[{path: DIGITS}, {path: OTHER, weight: 2}]"), asks="OTHER is new", says=ORDER
    ),
    "batch": Cell(("train.micro_batch_size=4",), says=ORDER),
    "sequence": Cell(("model.seq_length=128",), asks="model.seq_length", says=ORDER, stage="model.seq_length"),
    "moved": Cell(("data.path=DATA",), says="DATA, the same documents"),
    "replaced": Cell(("data.path=OTHER",), asks="DIGITS is left out; data: OTHER is new", says=ORDER),
}
EXHAUSTIVE = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def places(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("places")
    for name in ("moved", "other"):
        shutil.copytree(digits, folder / name)
    manifest = folder / "other" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"source": "other documents"}))
    return {"DIGITS": str(digits), "DATA": str(folder / "moved"), "OTHER": str(folder / "other")}


def filled(text: str, places: dict[str, str]) -> str:
    for name, path in places.items():
        text = text.replace(name, path)
    return text


def train(config: Path, run: Path, cell: Cell, places: dict[str, str], *more: str) -> Ended:
    settings = ("parallel.ep=1", "train.eval_every=0", "train.eval_batches=1", "checkpoint.asynchronous=false")
    changed = [filled(text, places) for text in cell.overrides]
    return mmscale("train", config, f"run.dir={run.parent}", "checkpoint.every=0", *settings, *changed, *more)


@pytest.mark.parametrize("name", CELLS)
def test_a_run_goes_on(name: str, config: Path, exported: Path, places: dict[str, str], tmp_path: Path) -> None:
    cell, run = CELLS[name], tmp_path / "tiny"
    shutil.copytree(exported / "bare", run)
    ended = train(config, run, cell, places, "train.steps=31")
    if cell.asks:
        assert_says(ended, status=2, cause=filled(cell.asks, places), remedy="--yes")
        assert Store.of_run(run).steps() == [30]
        ended = train(config, run, cell, places, "train.steps=31", "--yes")
    assert ended.status == 0, ended
    assert filled(cell.says, places) in ended.err
    assert read_metrics(run)[-1]["step"] == 31 and Store.of_run(run).steps()[-1] == 31


def test_a_run_without_held_out_documents(config: Path, digits: Path, tmp_path: Path) -> None:
    """It trains where nobody asks for an evaluation, and says that there is none."""
    folder = Path(shutil.copytree(digits, tmp_path / "all"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["validation"] = {"parts": []}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"tasks": []}))
    command = ("train", config, f"run.dir={tmp_path}", f"data.path={folder}", "parallel.ep=1", "train.steps=5")
    refused = mmscale(*command)
    assert_says(refused, status=3, cause="no held-out documents to evaluate on every 30", remedy="train.eval_every=0")
    ended = mmscale(*command, "train.eval_every=0")
    assert ended.status == 0 and "nothing is evaluated" in ended.err, ended
    assert not any(key.startswith("eval/") for line in read_metrics(tmp_path / "tiny") for key in line)
    assert_says(
        mmscale("eval", tmp_path / "tiny"), status=3, cause="'validation' of .* has no documents", remedy="held"
    )


@EXHAUSTIVE
@pytest.mark.parametrize("name", CELLS)
def test_its_stage_goes_on(name: str, config: Path, exported: Path, places: dict[str, str], tmp_path: Path) -> None:
    cell, run = CELLS[name], tmp_path / "tiny"
    shutil.copytree(exported / "tiny", run)
    more = ("--stage", "auxiliary", "auxiliary.steps=13", "auxiliary.optim.lr=1e-2")
    ended = train(config, run, cell, places, *more)
    if cell.stage:
        assert_says(ended, status=2, cause=f"another function than that of .*{cell.stage}", remedy="restore")
        return
    if cell.asks:
        assert_says(ended, status=2, cause=filled(cell.asks, places), remedy="--yes")
        ended = train(config, run, cell, places, *more, "--yes")
    assert ended.status == 0, ended


@EXHAUSTIVE
@pytest.mark.parametrize("name", CELLS)
def test_it_is_computed_as_it_was_trained(
    name: str, config: Path, exported: Path, places: dict[str, str], tmp_path: Path
) -> None:
    """By evaluation, export and drawing, after an attempt whose config.yaml says something else."""
    cell, run = CELLS[name], tmp_path / "tiny"
    shutil.copytree(exported / "tiny", run)
    if name == "moved":
        change_settings(run, lambda settings: settings["data"].update(path=str(tmp_path / "gone")))
    settings = yaml.safe_load((run / "config.yaml").read_text())
    for text in cell.overrides:
        key, _, value = text.partition("=")
        section, leaf = key.split(".")
        settings[section][leaf] = yaml.safe_load(filled(value, places))
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    found = [
        json.loads(mmscale("eval", one, "--routing", "causal", "--batches", "2", "--json").out)
        for one in (run, exported / "tiny")
    ]
    assert found[0]["loss"] == found[1]["loss"]
    drawn = []
    for number, one in enumerate((run, exported / "tiny")):
        out = tmp_path / f"drawn{number}"
        sampled = mmscale("sample", one, "--prompt", "a", "--count", "1", "--seed", "3", "--out", out)
        assert sampled.status == 0, sampled
        drawn.append((sampled.out.replace(str(out), "OUT"), [file.read_bytes() for file in sorted(out.glob("0*.png"))]))
    assert drawn[0] == drawn[1]
    ended = mmscale("convert", "to-hf", run, tmp_path / "hf")
    assert ended.status == 0, ended
    one, other = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "hf", exported / "tiny-hf")
    )
    for content in (one, other):
        content.get("mmscale", {}).get("config", {}).pop("data", None)  # where it lay
    assert one == other
