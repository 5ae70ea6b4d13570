"""`mmscale eval` says what the evaluated documents share with those that the model was trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import checkpoints_tools.huggingface.evaluate_export  # noqa: F401  what forked commands would import one by one
from mmscale.runs.events import BEGINS, read_events
from tests.end_to_end.running import change_settings, mmscale, ok


@pytest.fixture(scope="module")
def seen(digits: Path, digits_documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds out nine tenths of the documents, most of which the runs are trained on."""
    out = tmp_path_factory.mktemp("seen") / "set"
    documents = digits_documents / "documents.jsonl"
    ok("data", "prepare", "--documents", documents, "--like", digits, "--out", out, "data.prepare.held_out=0.9")
    return out


def leaks(*arguments: str | Path) -> list[str]:
    found: dict[str, Any] = json.loads(ok("eval", *arguments, "--batches", "1", "--json"))
    lines: list[str] = found.get("leaks", [])
    return lines


MODELS: dict[str, tuple[str, ...]] = {
    "dense": (),
    "tiny": (),
    "tiny causal": ("--routing", "causal"),
    "tiny-hf": (),
}


@pytest.mark.parametrize("model", ["dense", *(pytest.param(one, marks=pytest.mark.long) for one in list(MODELS)[1:])])
def test_a_set_that_was_trained_on_in_part(model: str, exported: Path, digits: Path, seen: Path) -> None:
    subject: tuple[str | Path, ...] = (exported / model.split()[0], *MODELS[model])
    lines = leaks(*subject, "--data", seen)
    assert lines and all(
        f"of held-out documents of {seen} are in training documents of {digits} too" in one for one in lines
    )
    assert leaks(*subject) == leaks(*subject, "--data", digits)
    assert not any(str(seen) in line for line in leaks(*subject))


def test_people_read_it(exported: Path, seen: Path) -> None:
    said = ok("eval", exported / "tiny", "--data", seen, "--batches", "1")
    assert f"note: {leaks(exported / 'tiny', '--data', seen)[0]}" in " ".join(said.split())


@pytest.fixture
def run(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported / "dense", tmp_path / "run"))


@pytest.mark.parametrize("weights", [(1.0, 1.0), pytest.param((1.0, 0.0), marks=pytest.mark.long)])
def test_every_source_of_a_blend_that_is_trained_on(
    weights: tuple[float, float], run: Path, digits: Path, seen: Path, tmp_path: Path
) -> None:
    """The first source trains on nothing that `seen` holds out, the second one on most of it."""
    other = Path(shutil.copytree(seen, tmp_path / "other"))
    blend = [{"path": str(folder), "weight": weight} for folder, weight in zip((seen, digits), weights, strict=True)]
    change_settings(run, lambda settings: settings["data"].update(path=None, blend=blend))
    lines = leaks(run, "--data", other)
    assert any(f"documents of {digits} too" in line for line in lines) == (weights[1] > 0)


@pytest.mark.long
def test_data_that_a_later_attempt_leaves_out(config: Path, digits: Path, seen: Path, tmp_path: Path) -> None:
    """The weights know it: the attempt that drops it says so, a further one, `eval`, and a stage on those weights."""
    other = Path(shutil.copytree(seen, tmp_path / "other"))
    rate = ("optim.schedule=constant", "optim.warmup=0")
    settings = ("train", config, f"run.dir={tmp_path}", "parallel.ep=1", "train.eval_every=0", *rate)
    ok(*settings, "train.steps=1")
    dropped = ("data.path=null", f"data.blend=[{{path: {digits}, weight: 0}}, {{path: {other}}}]", "--yes")
    shared = f"of held-out documents of {other} are in training documents of {digits} too"
    for steps in (2, 3):
        ended = mmscale(*settings, f"train.steps={steps}", *dropped)
        assert ended.status == 0 and shared in ended.err, ended
    run = tmp_path / "tiny"
    began = [event for event in read_events(run) if event["event"] in BEGINS]
    assert [any(shared in line for line in event.get("leaks", [])) for event in began] == [False, True, True]
    assert any(shared in line for line in leaks(run))
    tuned = ("--stage", "sft", f"sft.path={other}", "sft.steps=1", "sft.optim.warmup=0")
    ended = mmscale("train", run / "config.yaml", *tuned)
    assert ended.status == 0 and shared in ended.err, ended
    assert any(shared in line for line in leaks(run / "sft"))
    routers = ("--stage", "auxiliary", "auxiliary.steps=1", "auxiliary.calibration_batches=1")
    ended = mmscale("train", run / "sft" / "config.yaml", *routers)
    assert ended.status == 0 and shared in ended.err, ended


@pytest.mark.parametrize("lost", ["missing", pytest.param("replaced", marks=pytest.mark.long), "other tokenizers"])
def test_training_data_that_cannot_be_compared(lost: str, run: Path, digits: Path, seen: Path, tmp_path: Path) -> None:
    """A run says so, and an export, which was made to be moved, does not."""
    trained = tmp_path / "trained"
    shutil.copytree(digits, trained)
    change_settings(run, lambda settings: settings["data"].update(path=str(trained)))
    (run / "config.yaml").unlink()  # its paths would be used instead of missing ones
    manifest = trained / "manifest.json"
    content = json.loads(manifest.read_text())
    if lost == "missing":
        shutil.rmtree(trained)
        why = "which cannot be read"
    elif lost == "replaced":
        manifest.write_text(json.dumps(content | {"source": "other documents"}))
        why = "which were replaced after the run read them"
    else:
        manifest.write_text(json.dumps(content | {"tokenizers": content["tokenizers"] | {"image": "another"}}))
        why = "which have other tokenizers"
    assert leaks(run, "--data", seen) == [
        f"held-out documents are not compared with the training documents of {trained}, {why}"
    ]


def test_an_export_whose_training_data_are_gone(exported: Path, seen: Path, tmp_path: Path) -> None:
    hf = Path(shutil.copytree(exported / "dense-hf", tmp_path / "hf"))
    stored = json.loads((hf / "config.json").read_text())
    stored["mmscale"]["config"]["data"]["path"] = str(tmp_path / "gone")
    (hf / "config.json").write_text(json.dumps(stored))
    (hf / "MANIFEST.json").unlink()
    ended = mmscale("eval", hf, "--data", seen, "--batches", "1")
    assert ended.status == 0 and "training documents" not in ended.out
