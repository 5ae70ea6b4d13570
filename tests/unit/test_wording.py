"""Numbers with nouns; durations are in tests/unit/train/log/test_progress.py."""

from __future__ import annotations

import pytest

from mmscale.wording import numbered


@pytest.mark.parametrize(
    ("number", "nouns", "words"),
    [(0, ("step",), "0 steps"), (1, ("step",), "1 step"), (1200, ("batch", "batches"), "1,200 batches")],
)
def test_a_number_has_its_noun(number: int, nouns: tuple[str, ...], words: str) -> None:
    assert numbered(number, *nouns) == words
