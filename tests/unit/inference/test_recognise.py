"""Recognition of digits: real ones are read right, others count for what they are."""

from __future__ import annotations

import numpy as np
import pytest

from mmscale.data.built_in.digits import WORDS, labelled
from mmscale.errors import UsageError
from mmscale.inference.recognise import digit_of, recognise


def test_real_digits_are_read_as_asked_at_the_ceiling() -> None:
    images, labels = labelled(held_out=True)
    asked = [(f"draw a {WORDS[label]}", image[..., None]) for image, label in zip(images, labels, strict=True)]
    found = recognise(asked)
    assert found.share == pytest.approx(found.ceiling) and found.ceiling > 0.98
    assert found.asked == len(images) == sum(asked for asked, _ in found.by_word.values())
    assert found.right == sum(right for _, right in found.by_word.values())


def test_another_digit_and_nothing_are_wrong() -> None:
    images, labels = labelled(held_out=True)
    wrong = [(f"draw a {WORDS[(label + 1) % 10]}", image) for image, label in zip(images, labels, strict=True)]
    assert recognise(wrong).share < 0.02
    noise = np.random.default_rng(0).integers(0, 256, (200, 8, 8), dtype=np.uint8)
    assert recognise([(f"a {WORDS[number % 10]}", one) for number, one in enumerate(noise)]).share < 0.25
    assert recognise([(f"a {word}", None) for word in WORDS]).right == 0


@pytest.mark.parametrize(
    ("asked", "cause"),
    [
        ([], "nothing to recognise"),
        ([("draw it", None)], "'draw it' does not name one digit"),
        ([("one two", None)], "does not name one digit"),
        ([("draw a one", np.zeros((9, 8, 1), np.uint8))], "9 x 8 is no digit of 8 x 8"),
    ],
)
def test_refused(asked: list[tuple[str, np.ndarray | None]], cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        recognise(asked)


def test_digit_of() -> None:
    assert [digit_of(f"Write the digit {word}") for word in WORDS] == list(range(10))
