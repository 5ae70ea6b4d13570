# mmscale/data/prepared/questions.py: a user's questions as ids, and what is wrong with them.
"""Tests of files of questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmscale.data.documents.schema import Document, Text
from mmscale.data.prepared.encode import Encoded
from mmscale.data.prepared.manifest import read_manifest
from mmscale.data.prepared.prepare import prepare
from mmscale.data.prepared.questions import read_questions
from mmscale.data.prepared.tasks import identities_of, read_task, replaced
from mmscale.data.vocab import EOS
from mmscale.errors import DataError
from mmscale.inference.scores import encoder_of
from mmscale.train.steps.task_scores import describe
from tests.unit.data.samples import config, corpus, image, save_picture, text, write_jsonl

NAMES = [" picture", " picture number", " thing"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set whose settings name a file of questions."""
    root = tmp_path_factory.mktemp("questions")
    save_picture(root / "img/q.png", 3)
    content = [image("img/q.png"), text("this is a")]
    write_jsonl(root / "which.jsonl", [{"content": content, "choices": NAMES, "answer": n} for n in range(3)])
    write_jsonl(root / "name.jsonl", [{"content": [text("picture num")], "answer": "ber 3"}])
    tasks = {name: str(root / f"{name}.jsonl") for name in ("which", "name")}
    prepare(config(documents=[str(corpus(root / "in", 20))], tasks=tasks), root / "out", progress=False)
    return root


def test_prepared_with_the_data(folder: Path) -> None:
    manifest = read_manifest(folder / "out")
    assert {task.name: task.kind for task in manifest.tasks} == {"which": "choice", "name": "exact"}
    items = read_task(folder / "out", manifest, "which")
    assert [item.right for item in items] == [0, 1, 2]
    for item in items:
        start, end = item.answer
        assert item.ids[start:end] in item.choices and all(choice[-1] == EOS for choice in item.choices)
        assert len({choice[0] for choice in item.choices}) > 1  # what all begin with belongs to the question
    (exact,) = read_task(folder / "out", manifest, "name")
    settings = config(documents=[])
    data = settings.data.model_copy(update={"path": str(folder / "out")})
    encoder = encoder_of(settings.model_copy(update={"data": data}))
    (asked,) = encoder.encode([Document("a", (Text("this is a"),), "here")])
    file = write_jsonl(folder / "exact.jsonl", [json.dumps({"content": [text("this is a")], "answer": " picture"})])
    (whole,) = read_questions(file, encoder)
    assert isinstance(asked, Encoded)
    assert whole.ids[: whole.answer[0]] == tuple(asked.ids.tolist()[:-1]), "the question's last token is not asked for"
    assert exact.choices == () and exact.answer[1] == len(exact.ids) and exact.ids[-1] == EOS


def test_a_file_reads_the_same_beside_the_data(folder: Path) -> None:
    settings = config(documents=[])
    data = settings.data.model_copy(update={"path": str(folder / "out")})
    encoder = encoder_of(settings.model_copy(update={"data": data}))
    items = read_questions(folder / "which.jsonl", encoder)
    assert items == read_task(folder / "out", read_manifest(folder / "out"), "which")


@pytest.mark.parametrize(
    "fields", [{"choices": NAMES, "answer": 1}, {"answer": " picture number"}], ids=["which", "name"]
)
def test_the_end_of_the_document_can_be_left_out_of_answers(
    folder: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    settings = config(documents=[])
    data = settings.data.model_copy(update={"path": str(folder / "out")})
    encoder = encoder_of(settings.model_copy(update={"data": data}))
    records = [{"content": [text("this is a")]} | fields | end for end in ({}, {"end": True}, {"end": False})]
    whole, same, short = read_questions(write_jsonl(tmp_path / "ends.jsonl", records), encoder)
    assert whole == same and short.ids == whole.ids
    start, end = whole.answer
    assert short.answer == (start, end - 1) and whole.ids[end - 1] == EOS
    assert short.choices == tuple(choice[:-1] for choice in whole.choices)


BAD = {
    "no answer": ({"choices": NAMES}, "answer is None, no number from 0 to 2"),
    "number too large": ({"choices": NAMES, "answer": 3}, "no number from 0 to 2"),
    "true is no number": ({"choices": NAMES, "answer": True}, "no number from 0"),
    "one choice": ({"choices": [" a"], "answer": 0}, "at least two different texts"),
    "twice the same": ({"choices": [" a", " a"], "answer": 0}, "at least two different texts"),
    "no choices": ({"answer": 2}, "there are no choices, and answer is no text"),
    "end": ({"choices": NAMES, "answer": 0, "end": 1}, "end is 1, neither true nor false"),
    "unknown key": ({"choices": NAMES, "answer": 0, "choises": 1}, "unknown key 'choises'"),
    "no image": ({"content": [image("none.png")], "answer": "x"}, "none.png"),
}


@pytest.mark.parametrize(("fields", "cause"), BAD.values(), ids=BAD)
def test_what_is_no_question_is_refused(folder: Path, tmp_path: Path, fields: dict[str, Any], cause: str) -> None:
    settings = config(documents=[])
    data = settings.data.model_copy(update={"path": str(folder / "out")})
    encoder = encoder_of(settings.model_copy(update={"data": data}))
    file = write_jsonl(tmp_path / "bad.jsonl", [json.dumps({"content": [text("this is a")]} | fields)])
    with pytest.raises(DataError, match=r"^task: .*bad\.jsonl") as raised:
        read_questions(file, encoder)
    assert cause in raised.value.cause and raised.value.remedy


@pytest.mark.parametrize(("copies", "said"), [(1, False), (3, True)])
def test_equal_questions_are_said(copies: int, said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = [{"content": [text("this is a")], "choices": NAMES, "answer": n} for n in (0, *[1] * copies)]
    file = write_jsonl(tmp_path / "which.jsonl", questions)
    settings = config(documents=[str(corpus(tmp_path / "in", 20))], tasks={"which": str(file)})
    manifest = prepare(settings, tmp_path / "out")
    words = "4 questions; 2 of the questions equal an earlier one and count again"
    assert (f"note: task which: {words}" in capsys.readouterr().err) == said
    line = describe("which", read_task(tmp_path / "out", manifest, "which"), place=file)
    assert ("guessing gets 33.3%; 2 of the questions equal an earlier one and count again" in line) == said


def test_edited_questions_are_other_ones(folder: Path) -> None:
    """By what is asked, wherever it is read from; a task that is new or gone is not compared."""
    settings = config(documents=[])
    data = settings.data.model_copy(update={"path": str(folder / "out")})
    encoder = encoder_of(settings.model_copy(update={"data": data}))
    prepared = {"which": read_task(folder / "out", read_manifest(folder / "out"), "which")}
    file = folder / "which.jsonl"
    assert identities_of({"which": read_questions(file, encoder)}) == identities_of(prepared)
    content = file.read_text()
    edits = {
        "answer": content.replace('"answer": 2', '"answer": 1'),
        "choice": content.replace(" thing", " things"),
        "question": content.replace("this is a", "that is a"),
        "order": "".join(reversed(content.splitlines(keepends=True))),
        "picture": content.replace("img/q.png", "img/other.png"),
    }
    save_picture(folder / "img/other.png", 4)
    for edited in edits.values():
        assert edited != content
        asked = {"which": read_questions(write_jsonl(folder / "edited.jsonl", edited.splitlines()), encoder)}
        (line,) = replaced(identities_of(prepared), identities_of(asked))
        assert line.startswith("task which: other questions")
    assert replaced(identities_of(prepared), identities_of({"new": prepared["which"]})) == []
    assert replaced((), identities_of(prepared)) == []  # of a checkpoint from before this was kept
