"""`mmscale eval` of an export gives the run's causal numbers, and says what it cannot evaluate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import checkpoints_tools.huggingface.evaluate_export  # noqa: F401  what forked commands would import one by one
from tests.end_to_end.running import assert_says, change_settings, mmscale, ok

SAME = 2e-6  # fp32, means over 600 documents


def evaluated(*arguments: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ok("eval", *arguments, "--json"))
    return found


def assert_same_numbers(export: dict[str, Any], run: dict[str, Any]) -> None:
    numbers = {key: value for key, value in run.items() if isinstance(value, float)}
    assert {"loss", "z_loss", "loss/text", "bits_per_byte/text", "perplexity/image", "accuracy/digit"} <= numbers.keys()
    assert {key: value for key, value in export.items() if isinstance(value, float)} == pytest.approx(numbers, rel=SAME)


@pytest.mark.parametrize("routing", ["causal", *(pytest.param(one, marks=pytest.mark.long) for one in ("top1", None))])
def test_an_export_measures_what_its_run_measures(exported: Path, routing: str | None) -> None:
    """The run packs documents into sequences of 64 tokens, the export has one in a row."""
    name = "dense" if routing is None else "tiny"
    asked = () if routing is None else ("--routing", routing)
    export = evaluated(exported / f"{name}-hf", *asked)
    assert_same_numbers(export, evaluated(exported / name, *asked))
    assert export["routing"] == (routing or "none") and export["step"] is None


@pytest.mark.long
def test_the_same_batches_and_every_source_of_a_blend(exported: Path, digits: Path, tmp_path: Path) -> None:
    """Three global batches, of two sources: one in which no question is asked, and one that trains on images only."""
    half, run, hf = tmp_path / "again", tmp_path / "tiny", tmp_path / "hf"
    shutil.copytree(digits, half)
    for table in half.rglob("*.meta.npy"):
        content = np.load(table)
        content[:, -1] = 2
        np.save(table, content)
    shutil.copytree(exported / "tiny", run)
    shutil.copytree(exported / "tiny-hf", hf)
    blend = {"path": None, "blend": [{"path": str(digits)}, {"path": str(half), "weight": 2.0}]}
    change_settings(run, lambda settings: settings["data"].update(blend))
    stored = json.loads((hf / "config.json").read_text())
    stored["mmscale"]["config"]["data"].update(blend)
    (hf / "config.json").write_text(json.dumps(stored))
    (hf / "MANIFEST.json").unlink()  # it is another export now
    export = evaluated(hf, "--batches", "3")
    assert_same_numbers(export, evaluated(run, "--routing", "causal", "--batches", "3"))
    assert {f"source/{name}/loss/image" for name in (digits.name, half.name)} <= export.keys()
    assert f"source/{half.name}/loss/text" not in export
    assert export["loss"] != evaluated(hf)["loss"]


def test_questions_of_ones_own(exported: Path, tmp_path: Path) -> None:
    """A file of questions gets the same answers from a run and from its export, with the interval of the accuracy."""
    words = [" zero", " one", " two", " three"]
    lines = [{"content": [{"type": "text", "text": "this is"}], "choices": words, "answer": n % 4} for n in range(12)]
    choice, exact = tmp_path / "which.jsonl", tmp_path / "exact.jsonl"
    choice.write_text("".join(json.dumps(line) + "\n" for line in lines))
    content = [{"type": "text", "text": "draw "}]
    exact.write_text("".join(json.dumps({"content": content, "answer": word.strip()}) + "\n" for word in words))
    asked = ("--task", str(choice), "--task", f"write={exact}", "--batches", "1")
    run = evaluated(exported / "tiny", "--routing", "causal", *asked)
    export = evaluated(exported / "tiny-hf", *asked)
    assert run["tasks"] == export["tasks"]
    assert run["tasks"]["which"] | {"low": 0, "high": 0} == {
        "right": 3,
        "asked": 12,
        "low": 0,
        "high": 0,
        "chance": 0.25,
        "from": str(choice),
        "not_asked": [],
    }  # the same question with every answer: whichever the model prefers, it is right three times
    assert run["tasks"]["write"]["asked"] == 4 and run["tasks"]["write"]["chance"] is None
    assert run["accuracy/which"] == 0.25 and "digit" in run["tasks"]
    text = ok("eval", exported / "tiny-hf", *asked)
    (line,) = (line for line in text.splitlines() if line.startswith("accuracy/which"))
    assert "25.0%, 3 of 12 (95 % interval 8.9% to 53.2%, chance 25.0%)" in line


def test_people_read_the_routing_beside_every_number(exported: Path) -> None:
    text = ok("eval", exported / "tiny-hf", "--batches", "1")
    numbers = [line for line in text.splitlines() if line.startswith(("loss", "perplexity", "accuracy"))]
    assert len(numbers) >= 6 and {line.split()[-1] for line in numbers} == {"causal"}
    assert "use the future" not in text
    for model in ("dense", "dense-hf"):  # nothing routes
        text = ok("eval", exported / model, "--batches", "1")
        assert "loss/text" in text and "routing" not in text


def test_what_cannot_be_evaluated_is_said(exported: Path, config: Path, digits: Path, tmp_path: Path) -> None:
    hf = exported / "tiny-hf"
    ended = mmscale("eval", hf, "--routing", "batch")
    assert_says(ended, status=2, cause="batch routing needs a run", remedy="--routing causal")
    ended = mmscale("eval", f"{hf}@3")
    assert_says(ended, status=2, cause="has no steps", remedy="tiny-hf")
    ended = mmscale("eval", hf, "--data", tmp_path / "none")
    assert_says(ended, status=3, cause="there is no folder", remedy="data prepare")
    other = Path(shutil.copytree(digits, tmp_path / "other"))
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(
        json.dumps(manifest | {"tokenizers": manifest["tokenizers"] | {"image": "another"}})
    )
    for model in (hf, exported / "tiny"):
        ended = mmscale("eval", model, "--data", other)
        assert_says(ended, status=3, cause=r"image tokenizer of .*other \(another\) is another", remedy="tokenizers of")
    anew = Path(shutil.copytree(exported / "bare", tmp_path / "bare"))  # as if its own data were prepared anew
    change_settings(anew, lambda settings: settings["data"].update(path=str(other)))
    assert_says(
        mmscale("eval", anew), status=3, cause=r"\(another\) is another than that of step 30", remedy="tokenizers"
    )
    # A validation set that still has the checkpoint's tokenizers is not blamed for it.
    change_settings(anew, lambda settings: settings["data"].update(validation={"mine": str(digits)}))
    validation = f"data.validation={{mine: {digits}}}"
    train = ("train", config, f"run.dir={anew.parent}", "run.name=bare", f"data.path={other}", validation, "--yes")
    for command in (("eval", anew), (*train, "parallel.ep=1")):
        ended = mmscale(*command)
        assert_says(ended, status=3, cause=r"image tokenizer of .*other \(another\) is another than that", remedy="")
    damaged = Path(shutil.copytree(hf, tmp_path / "damaged"))
    (damaged / "model.safetensors").write_bytes((hf / "model.safetensors").read_bytes()[:-9])
    assert_says(mmscale("eval", damaged), status=4, cause="is damaged", remedy="export it again")
    (damaged / "config.json").write_text("{")
    assert_says(mmscale("eval", damaged), status=4, cause="is damaged: config.json cannot be read", remedy="again")
    (damaged / "MANIFEST.json").unlink()
    shutil.copy(hf / "model.safetensors", damaged)
    stored = json.loads((hf / "config.json").read_text())
    del stored["mmscale"]["tokenizers"]
    (damaged / "config.json").write_text(json.dumps(stored))
    assert_says(mmscale("eval", damaged), status=4, cause="says which tokenizers", remedy="export it again")


def test_an_export_of_an_older_version(exported: Path, tmp_path: Path) -> None:
    """Its settings stand in mmscale.json, its tokenizers in the report, and its config.json lacks newer keys."""
    hf = Path(shutil.copytree(exported / "tiny-hf", tmp_path / "hf"))
    content = json.loads((hf / "config.json").read_text())
    (hf / "mmscale.json").write_text(json.dumps({"format": 1, "config": content.pop("mmscale")["config"]}))
    (hf / "config.json").write_text(json.dumps({k: v for k, v in content.items() if k != "no_modality_id"}))
    (hf / "MANIFEST.json").unlink()
    assert evaluated(hf, "--batches", "1")["loss"] == evaluated(exported / "tiny-hf", "--batches", "1")["loss"]
    ok("convert", "from-hf", hf, tmp_path / "run")
