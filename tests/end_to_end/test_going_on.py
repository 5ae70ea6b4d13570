"""What differs from a checkpoint, crossed with what is done with it: right, refused in words, or only with `--yes`.

A run goes on, or its stage does, with changed settings and data; evaluation, export and drawing compute the checkpoint,
whatever the latest attempt's config.yaml says.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from mmscale.runs.metrics import read_metrics
from tests.end_to_end.going_on import CELLS, Courses, filled
from tests.end_to_end.running import assert_says, change_settings, mmscale

EXHAUSTIVE = pytest.mark.exhaustive


@pytest.mark.parametrize("name", CELLS)
def test_a_run_goes_on(name: str, config: Path, course: Courses, places: dict[str, str], tmp_path: Path) -> None:
    ended = course("run", name).act(tmp_path, lambda *more: mmscale("train", config, "parallel.ep=1", *more))
    assert ended is not None and filled(CELLS[name].says, places) in ended.err


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
def test_its_stage_goes_on(name: str, config: Path, course: Courses, tmp_path: Path) -> None:
    ended = course("stage", name).act(tmp_path, lambda *more: mmscale("train", config, "parallel.ep=1", *more))
    assert (ended is None) == bool(CELLS[name].stage)


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
