"""Accuracy on questions of a data set, or of a file of the user.

The question is everything before the answer. The last token of an answer is never in the input: with batch routing,
expert choice ranks all tokens of a sequence, so an answer in the input could be read from the routing of the question.
Other questions do share the sequence. With causal routing neither matters: an answer is scored given its prefix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmscale.data.prepared.tasks import TaskItem, said_twice
from mmscale.data.stream.answer_requests import AnswerRequest, Answers
from mmscale.wording import numbered

AnswersOf = Callable[[Sequence[AnswerRequest]], Answers]  # a model
NORMAL_95 = 1.959964  # quantile of the normal distribution for a 95 % interval


@dataclass(frozen=True)
class Score:
    """How many questions of a task were answered correctly.

    Attributes:
        right: number of questions answered correctly.
        asked: number of questions.
        chance: accuracy of guessing; None: the questions have no choices.
    """

    right: int
    asked: int
    chance: float | None

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the accuracy (Wilson's score interval)."""
        share, n = self.accuracy, self.asked
        middle = (share + NORMAL_95**2 / (2 * n)) / (1 + NORMAL_95**2 / n)
        half = NORMAL_95 / (1 + NORMAL_95**2 / n) * math.sqrt(share * (1 - share) / n + NORMAL_95**2 / (4 * n**2))
        return max(0.0, middle - half), min(1.0, middle + half)

    def as_dict(self) -> dict[str, float | int | None]:
        """Plain data for `eval --json`."""
        low, high = self.interval
        return {"right": self.right, "asked": self.asked, "low": low, "high": high, "chance": self.chance}


def chance_of(items: Sequence[TaskItem]) -> float | None:
    """Accuracy of guessing; None: the questions have no choices."""
    return sum(1 / len(item.choices) for item in items) / len(items) if items[0].choices else None


def describe(name: str, items: Sequence[TaskItem], *, place: Path, others: Sequence[Path] = ()) -> str:
    """One line for the start of a run.

    Args:
        name: of the task.
        items: its questions.
        place: the data set or the file that they come from.
        others: data sets whose task of that name is not used.
    """
    chance = chance_of(items)
    how = "written exactly" if chance is None else f"guessing gets {chance:.1%}"
    asked = f"{numbered(len(items), 'question')} of {place}"
    return f"task {name}: {asked}, {how}{unasked(name, [*map(str, others)])}{said_twice(items)}"


def unasked(name: str, others: Sequence[str]) -> str:
    """Says which data sets have a task of this name that is not used; empty if there are none."""
    if not others:
        return ""
    return f"; the task {name} of {', '.join(others)} is not asked (only one task of a name is)"


def score(items: Sequence[TaskItem], *, answers: AnswersOf) -> Score:
    """Ask all questions of a task.

    If there are choices, the model's answer is the one with the highest likelihood: the sum of its tokens'
    log-probabilities. Without choices, the answer is correct if each of its tokens is the most likely one given the
    tokens before it. (With causal routing this is what greedy generation would write.)

    Args:
        items: questions of one kind.
        answers: the model.
    """
    chance = chance_of(items)
    if chance is None:
        found = answers([AnswerRequest(item.ids[: item.answer[1]], item.answer[0]) for item in items])
        lengths = [end - start for start, end in (item.answer for item in items)]
        return Score(int((found.likeliest == lengths).sum()), len(items), None)
    asked = [
        AnswerRequest((*item.ids[: item.answer[0]], *choice), item.answer[0])
        for item in items
        for choice in item.choices
    ]
    log_p, right, first = answers(asked).log_p, 0, 0
    for item in items:
        own = log_p[first : first + len(item.choices)]
        right += int(np.argmax(own)) == item.right
        first += len(item.choices)
    return Score(right, len(items), chance)
