# mmscale/train/steps/task_scores.py: which answers count as right, and how sure an accuracy is.
"""Tests of tasks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from mmscale.data.prepared.tasks import TaskItem
from mmscale.data.stream.answer_requests import AnswerRequest, Answers
from mmscale.train.steps.task_scores import Score, score

VOCABULARY = 12


def counts_up(asked: Sequence[AnswerRequest]) -> Answers:
    """A model that is sure that every token is followed by the next number."""
    log_p, likeliest = np.zeros(len(asked)), np.zeros(len(asked), np.int64)
    for number, one in enumerate(asked):
        right = [one.ids[at] == (one.ids[at - 1] + 1) % VOCABULARY for at in range(one.start, len(one.ids))]
        log_p[number], likeliest[number] = sum(-0.1 if known else -9.0 for known in right), sum(right)
    return Answers(log_p, likeliest)


def item(question: Sequence[int], right: Sequence[int], *others: Sequence[int]) -> TaskItem:
    ids = (*question, *right)
    choices = tuple(tuple(choice) for choice in (right, *others)) if others else ()
    return TaskItem(tuple(ids), (len(question), len(ids)), choices)


CASES = {
    "one token": ([item([1, 2], [3], [5]), item([1, 2], [5], [3])], 1, 0.5),
    "several tokens": ([item([1], [2, 3], [4, 5], [6, 7]), item([1], [9], [2, 3], [4, 5])], 1, 1 / 3),
    "exact": ([item([1], [2, 3, 4]), item([1], [2, 3, 5]), item([7], [8])], 2, None),
}


@pytest.mark.parametrize(("items", "right", "chance"), CASES.values(), ids=CASES)
def test_right_answers(items: list[TaskItem], right: int, chance: float | None) -> None:
    found = score(items, answers=counts_up)
    assert (found.right, found.asked) == (right, len(items))
    assert found.chance == (None if chance is None else pytest.approx(chance))


@pytest.mark.parametrize(
    ("right", "asked", "interval"),
    [(11, 48, (0.1331, 0.3654)), (0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (5, 48, (0.0453, 0.2217))],
)
def test_interval(right: int, asked: int, interval: tuple[float, float]) -> None:
    """Wilson's interval, as statsmodels.stats.proportion.proportion_confint(method="wilson") gives it."""
    assert Score(right, asked, None).interval == pytest.approx(interval, abs=2e-4)
