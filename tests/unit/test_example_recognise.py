"""Recognition of digits: real ones are read right, others count for what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from tests import digits

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def program() -> Any:
    return digits.program("digits/recognise")


def test_real_digits_are_read_as_asked_at_the_ceiling(program: Any, digits_documents: Path) -> None:
    images, labels = program.labelled(digits_documents, "validation")
    asked = [(f"draw a {WORDS[label]}", image) for image, label in zip(images, labels, strict=True)]
    found = program.recognise(digits_documents, asked)
    assert found["share"] == pytest.approx(found["ceiling"]) and round(found["ceiling"], 3) == 0.990
    assert found["asked"] == len(images) == sum(row["asked"] for row in found["by_word"].values())
    assert found["right"] == sum(row["right"] for row in found["by_word"].values())


def test_another_digit_and_nothing_are_wrong(program: Any, digits_documents: Path) -> None:
    images, labels = program.labelled(digits_documents, "validation")
    wrong = [(f"draw a {WORDS[(label + 1) % 10]}", image) for image, label in zip(images, labels, strict=True)]
    assert program.recognise(digits_documents, wrong)["share"] < 0.02
    noise = np.random.default_rng(0).integers(0, 256, (200, 8, 8), dtype=np.uint8)
    drawn = [(f"a {WORDS[number % 10]}", one) for number, one in enumerate(noise)]
    assert program.recognise(digits_documents, drawn)["share"] < 0.25
    assert program.recognise(digits_documents, [(f"a {word}", None) for word in WORDS])["right"] == 0


def test_the_first_picture_of_each_sample_counts(
    program: Any, digits_documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `mmscale sample --json` names them; a sample without one is wrong."""
    images, labels = program.labelled(digits_documents, "train")
    pieces = []
    for number in (0, 1):
        PIL.Image.fromarray(images[number]).save(tmp_path / f"{number}.png")
        pieces.append({"image": str(tmp_path / f"{number}.png")})
    prompts = [f"draw a {WORDS[label]}" for label in labels[:2]]
    samples = [
        {"prompt": prompts[0], "pieces": [{"text": "a"}, pieces[0], pieces[1]]},
        {"prompt": prompts[0], "pieces": [pieces[1], pieces[0]]},
        {"prompt": prompts[1], "pieces": [{"text": "nothing"}]},
    ]
    (tmp_path / "samples.json").write_text(json.dumps({"samples": samples}))
    assert program.main([str(digits_documents), str(tmp_path / "samples.json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["asked"], found["right"]) == (3, 1)
    assert program.main([str(digits_documents), str(tmp_path / "samples.json")]) == 0
    assert capsys.readouterr().out.startswith("1 of 3 drawn digits (33.3%) are read as asked by a classifier")


@pytest.mark.parametrize(
    ("asked", "cause"),
    [
        ([], "nothing to recognise"),
        ([("draw it", None)], "'draw it' does not name one digit"),
        ([("one two", None)], "does not name one digit"),
        ([("draw a one", np.zeros((9, 8), np.uint8))], "9 x 8 pixels is no digit of 8 x 8"),
    ],
)
def test_refused(program: Any, digits_documents: Path, asked: list[tuple[str, np.ndarray | None]], cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        program.recognise(digits_documents, asked)


@pytest.mark.parametrize(("content", "cause"), [("{}", "no output of"), ("[", "no output of"), (None, "No such file")])
def test_what_is_no_output_of_sample_is_refused(program: Any, content: str | None, cause: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "samples.json").write_text(content)
    with pytest.raises(SystemExit, match=r"^error: ") as refused:
        program.main([str(tmp_path), str(tmp_path / "samples.json")])
    assert cause in str(refused.value)


def test_digit_of(program: Any) -> None:
    assert [program.digit_of(f"Write the digit {word}") for word in WORDS] == list(range(10))
