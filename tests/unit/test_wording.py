"""Numbers with nouns; durations are in tests/unit/train/log/test_progress.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmscale.cli.sampled import _items
from mmscale.data.prepared.tasks import TaskItem
from mmscale.train.steps.task_scores import describe
from mmscale.wording import numbered


@pytest.mark.parametrize(
    ("number", "nouns", "words"),
    [(0, ("step",), "0 steps"), (1, ("step",), "1 step"), (1200, ("batch", "batches"), "1,200 batches")],
)
def test_a_number_has_its_noun(number: int, nouns: tuple[str, ...], words: str) -> None:
    assert numbered(number, *nouns) == words


ONE_QUESTION = TaskItem((1, 5, 6), (1, 2), ())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (_items({"files": {}, "images": ["a.png"]}), "1 image"),
        (_items({"files": {"audio": ["a.wav"]}, "images": []}), "1 audio file"),
        (_items({"files": {"audio": ["a.wav", "b.wav"]}, "images": ["a.png", "b.png"]}), "2 images and 2 audio files"),
        (describe("which", [ONE_QUESTION], place=Path("data/own")), "task which: 1 question of data/own"),
    ],
)
def test_lines_that_often_count_one(words: str, said: str) -> None:
    assert words.startswith(said)
