"""Accuracy on the questions that a data set defines.

The question is everything before the answer, and where one token decides, the answer is not shown: with batch routing
expert choice ranks all tokens of a sequence, so an answer in the input could be read from the routing of the question.
Other questions do share the sequence. With causal routing neither matters: an answer is scored given its prefix.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mmscale.data.packed import fill_rows, pack_rows
from mmscale.data.tasks import TaskItem
from mmscale.inference.model import RunModel
from mmscale.model.mixed_modal import Routing


def choice_accuracy(model: RunModel, items: Sequence[TaskItem], *, routing: Routing = Routing.BATCH) -> float:
    """Share of questions whose right answer has the highest likelihood among the choices.

    Answers of one token are read from one position; longer ones are scored by the sum of their tokens'
    log-probabilities, each choice in a document of its own.
    """
    if all(len(choice) == 1 for item in items for choice in item.choices):
        return _by_one_token(model, items, routing)
    return _by_whole_answers(model, items, routing)


def _by_one_token(model: RunModel, items: Sequence[TaskItem], routing: Routing) -> float:
    questions = [np.array(item.ids[: item.answer[0]], dtype=np.int64) for item in items]
    scores = _log_probabilities(model, questions, routing)
    right = 0
    for item, question, score in zip(items, questions, scores, strict=True):
        values = score[len(question) - 1][[choice[0] for choice in item.choices]]
        right += int(values.argmax()) == item.right
    return right / len(items)


def _by_whole_answers(model: RunModel, items: Sequence[TaskItem], routing: Routing) -> float:
    documents = [
        np.array((*item.ids[: item.answer[0]], *choice), dtype=np.int64) for item in items for choice in item.choices
    ]
    scores = iter(zip(documents, _log_probabilities(model, documents, routing), strict=True))
    right = 0
    for item in items:
        values = []
        for choice in item.choices:
            document, score = next(scores)
            first = len(document) - len(choice)
            values.append(sum(score[first + i - 1][token] for i, token in enumerate(choice)))
        right += int(np.argmax(values)) == item.right
    return right / len(items)


def _log_probabilities(
    model: RunModel, documents: Sequence[NDArray[np.int64]], routing: Routing
) -> list[NDArray[np.float32]]:
    """For each document [tokens, vocabulary]: log-probabilities of the next token."""
    length, size = model.config.model.seq_length, model.config.train.micro_batch_size
    rows = fill_rows(documents, seq_length=length)
    found: list[NDArray[np.float32]] = []
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        content = [[documents[number] for number in row] for row in part]
        batch, places = pack_rows(content, vocabulary=model.vocabulary, seq_length=length)
        log_p = model.logits(batch, routing).log_softmax(dim=-1).numpy()
        for row, row_places in zip(part, places, strict=True):
            for number, place in zip(row, row_places, strict=True):
                found.append(log_p[place.row, place.start : place.start + len(documents[number])].copy())
    return found
