# mmscale/data/documents/chat.py: every form of chat records that is read, and every reason to refuse one.
"""Tests of reading conversations."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from mmscale.data.documents.readers import list_files, scan_files
from mmscale.data.documents.schema import Document, Image, Rejected, Special, Text
from mmscale.data.documents.slices import ReadSettings
from tests.unit.data.samples import save_picture, write_jsonl

ASKED, SAID = "Which digit is this?", "seven"
# The pieces of a question with a picture and its answer.
SHOWN = ["<user>", "picture", ASKED, "<eot>", "<assistant>", SAID, "<eot>"]
TRAINED = (False, False, False, False, False, True, True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in (1, 2):
        save_picture(tmp_path / f"{number}.png", number)
    return tmp_path


def read(folder: Path, record: Any, **settings: Any) -> Document | Rejected:
    file = write_jsonl(folder / "chat.jsonl", [record])
    (item,) = [
        one for part in scan_files([file], slice_records=9, settings=ReadSettings(**settings)) for one in part.read()
    ]
    return item


def shown(document: Document | Rejected) -> list[str]:
    assert isinstance(document, Document), document
    kinds = {Text: lambda one: one.text, Special: lambda one: one.token, Image: lambda one: "picture"}
    return [kinds[type(piece)](piece) for piece in document.content]


def answer(role: str = "assistant", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": SAID, **more}


def messages(content: Any, *others: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, *(others or (answer(),))]}


def data_uri(folder: Path) -> str:
    return "data:image/png;base64," + base64.b64encode((folder / "1.png").read_bytes()).decode()


FORMS: dict[str, Any] = {
    "parts": lambda folder: messages([{"type": "image", "path": "1.png"}, {"type": "text", "text": ASKED}]),
    "OpenAI, a path": lambda folder: messages(
        [{"type": "image_url", "image_url": {"url": "1.png"}}, {"type": "text", "text": ASKED}]
    ),
    "OpenAI, a data URI": lambda folder: messages(
        [{"type": "image_url", "image_url": {"url": data_uri(folder)}}, {"type": "text", "text": ASKED}]
    ),
    "an image without a path": lambda folder: (
        messages([{"type": "image"}, {"type": "text", "text": ASKED}]) | {"images": ["1.png"]}
    ),
    "an image by its key": lambda folder: messages(
        [{"type": "image", "image": "1.png"}, {"type": "text", "text": ASKED}]
    ),
    "nulls of a table": lambda folder: messages(
        [{"type": "image", "image": "1.png", "text": None}, {"type": "text", "text": ASKED, "image": None}]
    ),
    "a placeholder": lambda folder: messages(f"<image>\n{ASKED}") | {"image": "1.png"},
    "two texts": lambda folder: messages(
        [{"type": "image", "path": "1.png"}, {"type": "text", "text": ASKED[:5]}, {"type": "text", "text": ASKED[5:]}]
    ),
    "LLaVA": lambda folder: {
        "id": "a",
        "image": "1.png",
        "conversations": [{"from": "human", "value": f"<image>\n{ASKED}"}, {"from": "gpt", "value": SAID}],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(folder: Path, form: str) -> None:
    document = read(folder, FORMS[form](folder))
    assert shown(document) == SHOWN
    assert isinstance(document, Document) and document.answers == TRAINED


@pytest.mark.parametrize(
    ("roles", "tokens"),
    [
        (("system", "user", "assistant"), ("<system>", "<user>", "<assistant>")),
        (("developer", "user", "assistant"), ("<system>", "<user>", "<assistant>")),
        (("user", "assistant", "tool", "assistant"), ("<user>", "<assistant>", "<tool>", "<assistant>")),
    ],
)
def test_roles(folder: Path, roles: tuple[str, ...], tokens: tuple[str, ...]) -> None:
    document = read(folder, {"messages": [answer(role) for role in roles]})
    assert shown(document) == [one for token in tokens for one in (token, SAID, "<eot>")]
    assert isinstance(document, Document)
    assert document.answers == tuple(one for token in tokens for one in (False, *[token == "<assistant>"] * 2))


def test_share_gpt_with_several_turns_and_a_picture_in_an_answer(folder: Path) -> None:
    turns = [("human", "a"), ("gpt", "<image>"), ("human", "b"), ("gpt", "c<image>d")]
    record = {"images": ["1.png", "2.png"], "conversations": [{"from": who, "value": what} for who, what in turns]}
    document = read(folder, record)
    assert shown(document) == [
        *("<user>", "a", "<eot>", "<assistant>", "picture", "<eot>"),
        *("<user>", "b", "<eot>", "<assistant>", "c", "picture", "d", "<eot>"),
    ]
    assert isinstance(document, Document) and [Path(str(one.source)).name for one in document.images] == [
        "1.png",
        "2.png",
    ]
    assert document.answers is not None and sum(document.answers) == 6


def test_an_answer_of_weight_0_is_not_trained_on(folder: Path) -> None:
    document = read(folder, messages("a", answer(weight=0), {"role": "user", "content": "b"}, answer(weight=1)))
    assert isinstance(document, Document) and document.answers is not None
    assert [place for place, trained in enumerate(document.answers) if trained] == [10, 11]


def test_without_pictures_a_placeholder_is_text(folder: Path) -> None:
    assert shown(read(folder, messages("what does <image> mean?")))[1] == "what does <image> mean?"


REFUSED: dict[str, tuple[Any, str]] = {
    "both": ({"content": [], "messages": []}, "has both content and messages"),
    "no list": ({"messages": "hello"}, "messages is no list of messages"),
    "no message": ({"messages": []}, "messages is no list of messages"),
    "not an object": ({"messages": ["hello"]}, r"messages\[0\] is a str"),
    "role": ({"messages": [answer("robot")]}, "role is 'robot'; known are system, developer, user"),
    "no role": ({"conversations": [answer()]}, "has the key 'role', which is not read"),
    "no content": (messages(None), "content is neither a text nor a list"),
    "tool calls": (messages("a", answer(tool_calls=[1])), r"messages\[1\] has the key 'tool_calls', which is not read"),
    "weight": (messages("a", answer(weight=0.5)), "weight is 0.5, neither 0 nor 1"),
    "empty": (messages(""), r"messages\[0\] is empty"),
    "empty answer": (messages("a", {"role": "assistant", "content": []}), r"messages\[1\] is empty"),
    "part": (messages([3]), r"messages\[0\]\[0\] is a int"),
    "kind of part": (messages([{"type": "video", "path": "a"}]), r"messages\[0\]: content\[0\] has type 'video'"),
    "no answer": ({"messages": [{"role": "user", "content": "a"}]}, "no message of the assistant that is trained on"),
    "more pictures": (messages("a <image>") | {"images": ["1.png", "2.png"]}, "has 2 pictures, .* for 1"),
    "fewer pictures": (messages("<image> <image>") | {"image": "1.png"}, "the record has no further one"),
    "web": (messages("<image>") | {"image": "https://a/b.png"}, "on the web: download it"),
    "data URI": (messages("<image>") | {"image": "data:image/png,abc"}, "a data URI that is not base64"),
    "missing picture": (messages("<image>") | {"image": "3.png"}, "3.png is missing"),
    "outside": (messages("<image>") | {"image": "../1.png"}, "leaves the folder"),
    "a picture beside content": ({"content": [{"type": "text", "text": "a"}], "image": "1.png"}, "unknown key 'image'"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused(folder: Path, why: str) -> None:
    record, reason = REFUSED[why]
    found = read(folder, record)
    assert isinstance(found, Rejected)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found.reason)


def test_keys_that_the_user_ignores(folder: Path) -> None:
    record = messages("a", answer(reasoning="x")) | {"source": "web"}
    assert isinstance(read(folder, record), Rejected)
    assert isinstance(read(folder, record, ignore=("reasoning", "source")), Document)


def test_tables(folder: Path) -> None:
    """Columns of messages, as in data sets of the Hugging Face hub, and of JSON text."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    turns = messages(f"<image>{ASKED}")["messages"]
    pictures = [{"bytes": (folder / "1.png").read_bytes(), "path": None}]
    parquet.write_table(pa.table({"messages": [turns], "images": [pictures]}), folder / "nested.parquet")
    parquet.write_table(pa.table({"messages": [json.dumps(turns)], "images": [["1.png"]]}), folder / "json.parquet")
    for name in ("nested", "json"):
        (part,) = scan_files(list_files([str(folder / f"{name}.parquet")]), slice_records=9)
        (document,) = part.read()
        assert shown(document) == SHOWN


def test_a_changed_picture_is_noticed(folder: Path) -> None:
    file = write_jsonl(folder / "chat.jsonl", [FORMS["LLaVA"](folder), FORMS["OpenAI, a path"](folder)])
    (before,) = scan_files([file], slice_records=9)
    save_picture(folder / "1.png", 77, size=9)
    (after,) = scan_files([file], slice_records=9)
    assert before.items and before.items != after.items
