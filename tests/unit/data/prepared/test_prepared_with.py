"""A run says if its configuration describes another preparation of its data than the one that was done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.goodput import goodput
from mmscale.config import Config
from mmscale.data.prepared.manifest import read_blend
from mmscale.data.prepared.prepare import prepare
from mmscale.data.prepared.prepared_with import other_settings
from mmscale.inference.chosen_data import with_data
from mmscale.report import page
from mmscale.train.evaluated_on import EvaluatedOn
from tests.unit.data.samples import config, image, save_picture, text, write_jsonl

IMAGE = {"kind": "levels", "size": 4, "channels": 1}
# Settings given to `data prepare` alone, and what is said of each.
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "fit": ({"image": IMAGE | {"fit": "pad"}}, "data.prepare.image.fit pad (the configuration: crop)"),
    "background": ({"image": IMAGE | {"background": [0, 0, 0]}}, "background [0, 0, 0] (the configuration: [255,"),
    "damaged": ({"image": IMAGE | {"damaged": "salvage"}}, "damaged salvage (the configuration: reject)"),
    "held out": ({"held_out": 0.5}, "data.prepare.held_out 0.5 (the configuration: 0.25)"),
    "text": ({"text": {"kind": "bytes"}}, "data.prepare.text.kind bytes (the configuration: bpe)"),
    "longest": ({"max_document_tokens": 99}, "max_document_tokens 99 (the configuration: 4096)"),
    "canaries": ({"canaries": {"count": 2}}, "data.prepare.canaries.count 2 (the configuration: null)"),
    "ignored": ({"ignore": ["author"]}, "data.prepare.ignore ['author'] (the configuration: [])"),
    "tasks": ({"tasks": {"which": "QUESTIONS"}}, "data.prepare.tasks.which a file (the configuration: null)"),
}


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("in")
    for n in range(12):
        save_picture(folder / f"{n}.png", n)
    records = [{"id": str(n), "content": [text(f"word {n}"), image(f"{n}.png")]} for n in range(12)]
    question = {"id": "1", "content": [text("word")], "choices": [" a", " b"], "answer": 1}
    (folder / "which.jsonl").write_text(json.dumps(question) + "\n")
    return write_jsonl(folder / "d.jsonl", records)


def made(documents: Path, out: Path, **settings: Any) -> Path:
    questions = {"tasks": {"which": str(documents.parent / "which.jsonl")}} if "tasks" in settings else {}
    prepare(config(**({"documents": [str(documents)]} | settings | questions)), out, progress=False)
    return out


def reading(file: Path, *folders: Path, **settings: Any) -> Config:
    """A configuration that describes a preparation, and reads some data sets."""
    given = config(**({"documents": [str(file)]} | settings)).model_dump(mode="json")
    given["data"]["blend"] = [{"path": str(folder)} for folder in folders]
    return Config.model_validate(given)


def on_the_page(made: Config, run: Path) -> str:
    """The page of a run of this configuration."""
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(made.model_dump(mode="json")))
    (run / "metrics.jsonl").write_text('{"step": 1, "attempt": 1, "loss": 2.0, "loss/text": 2.0}\n')
    start = {"time": 1.0, "attempt": 1, "event": "start", "step": 0}
    start |= EvaluatedOn.of(made, read_blend(made), {}).start_fields
    (run / "events.jsonl").write_text(json.dumps(start) + "\n")
    page.write_page(page.read_runs([run], goodput=goodput), run / "report.html")
    return (run / "report.html").read_text()


@pytest.mark.parametrize("what", OTHERS)
def test_what_was_given_to_prepare_alone(what: str, documents: Path, tmp_path: Path) -> None:
    settings, said = OTHERS[what]
    out = made(documents, tmp_path / "out", **settings)
    (line,) = other_settings(reading(documents, out))
    assert said in line and str(out) in line and "prepare the data again" in line
    started = EvaluatedOn.of(reading(documents, out), read_blend(reading(documents, out)), {}).lines
    assert f"note: {line}" in started
    assert on_the_page(reading(documents, out), tmp_path / "run").count(f"; {out} was prepared with ") >= 1
    assert other_settings(with_data(reading(documents, tmp_path / "another"), out)) == []


def test_the_same_settings(documents: Path, tmp_path: Path) -> None:
    """Whatever is written, whether it is the default, and with other numbers of processes."""
    out = made(documents, tmp_path / "out", image=IMAGE | {"fit": "pad"}, workers=1)
    assert other_settings(reading(documents, out, image=IMAGE | {"fit": "pad"}, workers=2, strict=True)) == []
    assert other_settings(reading(documents, out, image=IMAGE | {"fit": "pad"}, documents=["elsewhere.jsonl"])) == []


@pytest.mark.parametrize("first", [True, False])
def test_of_a_blend_one_set_is_described(first: bool, documents: Path, tmp_path: Path) -> None:
    one, other = made(documents, tmp_path / "one"), tmp_path / "other"
    load = {"load": str(one / "text_tokenizer" / "tokenizer.json")}
    made(documents, other, text=load, held_out=0.5)
    folders = (one, other) if first else (other, one)
    assert other_settings(reading(documents, *folders)) == []
    (line,) = other_settings(reading(documents, *folders, max_document_tokens=99))
    assert line.startswith(f"{one} was prepared with data.prepare.max_document_tokens 4096 (the configuration: 99),")


def test_no_preparation_is_described(documents: Path, tmp_path: Path) -> None:
    out = made(documents, tmp_path / "out")
    given = reading(documents, out).model_dump(mode="json")
    given["data"]["prepare"] = None
    assert other_settings(Config.model_validate(given)) == []
    assert "was prepared with" not in on_the_page(reading(documents, out), tmp_path / "run")
    (out / "source.json").unlink()  # of another program
    assert other_settings(reading(documents, out, held_out=0.5)) == []
