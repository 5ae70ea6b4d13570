"""Accuracy on the questions that a data set defines.

The question is everything before the answer, and where one token decides, the answer is not shown: with batch routing
expert choice ranks all tokens of a sequence, so an answer in the input could be read from the routing of the question.
Other questions do share the sequence. With causal routing neither matters: an answer is scored given its prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from mmscale.data.tasks import TaskItem

# Documents -> for each [tokens, vocabulary] log-probabilities of the next token.
LogProbabilities = Callable[[Sequence[NDArray[np.int64]]], list[NDArray[np.float32]]]


def choice_accuracy(items: Sequence[TaskItem], *, log_probabilities: LogProbabilities) -> float:
    """Share of questions whose right answer has the highest likelihood among the choices.

    Answers of one token are read from one position; longer ones are scored by the sum of their tokens'
    log-probabilities, each choice in a document of its own.

    Args:
        items: questions.
        log_probabilities: the model.
    """
    if all(len(choice) == 1 for item in items for choice in item.choices):
        return _by_one_token(items, log_probabilities)
    return _by_whole_answers(items, log_probabilities)


def _by_one_token(items: Sequence[TaskItem], log_probabilities: LogProbabilities) -> float:
    questions = [np.array(item.ids[: item.answer[0]], dtype=np.int64) for item in items]
    right = 0
    for item, question, score in zip(items, questions, log_probabilities(questions), strict=True):
        values = score[len(question) - 1][[choice[0] for choice in item.choices]]
        right += int(values.argmax()) == item.right
    return right / len(items)


def _by_whole_answers(items: Sequence[TaskItem], log_probabilities: LogProbabilities) -> float:
    documents = [
        np.array((*item.ids[: item.answer[0]], *choice), dtype=np.int64) for item in items for choice in item.choices
    ]
    scores = iter(zip(documents, log_probabilities(documents), strict=True))
    right = 0
    for item in items:
        values = []
        for choice in item.choices:
            document, score = next(scores)
            first = len(document) - len(choice)
            values.append(sum(score[first + i - 1][token] for i, token in enumerate(choice)))
        right += int(np.argmax(values)) == item.right
    return right / len(items)
