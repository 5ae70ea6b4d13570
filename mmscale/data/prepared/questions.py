"""Reads a file of questions: documents without their end, with answers to choose from or the one correct answer.

One JSON object per line, with the keys of a document and

    "choices": [" cat", " dog"], "answer": 1       which of these ends the document?
    "answer": " dog"                                does the model write exactly this?

An answer is appended to the last text unchanged, with its leading space if it has one. A conversation ends with a
message of the user, and the answer is the assistant's message that follows. With "end": false, the end of the document
or message is no part of the answer. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmscale import bounded
from mmscale.config import Config
from mmscale.data.documents.schema import (
    Content,
    Document,
    Rejected,
    Special,
    Text,
    folder_resolver,
    parse_document,
)
from mmscale.data.modalities.table import open_codecs
from mmscale.data.modalities.text_tokens import open_text_tokenizer
from mmscale.data.prepared.encode import DocumentEncoder, Encoded
from mmscale.data.prepared.manifest import most_complete, read_blend
from mmscale.data.prepared.named_tasks import named_tasks
from mmscale.data.prepared.tasks import TaskItem, read_task
from mmscale.data.vocab import ASSISTANT, END_OF_TURN, Vocabulary
from mmscale.errors import DataError

_MOST_LINE = 64 << 20  # bytes, as for documents
_FORMAT = 'a question is a document with "choices": ["...", "..."] and "answer": NUMBER from 0, or with "answer": "..."'


@dataclass(frozen=True)
class _Question:
    """A line of the file.

    Attributes:
        document: the part before the answer.
        answers: the texts to choose from; if there is only one, the model must write exactly this.
        right: index of the correct one.
        end: whether the end of the document or message belongs to each answer.
    """

    document: Document
    answers: tuple[str, ...]
    right: int
    end: bool


def read_questions(file: Path, encoder: DocumentEncoder) -> list[TaskItem]:
    """The questions of a file as ids.

    Args:
        file: JSONL; image paths are relative to its folder.
        encoder: makes ids in the same way as for the data set's documents.

    Raises:
        DataError: the file is missing, a line is not a question, or two answers have the same ids.
    """
    return [_encoded(question, encoder) for question in _read(file)]


def check_questions(file: Path) -> None:
    """Refuse a file of questions by its text and by the names of pictures in it, without tokenizers.

    Args:
        file: JSONL; image paths are relative to its folder.

    Raises:
        DataError: the file or a picture is missing, or a line is not a question.
    """
    for _ in _read(file):
        pass


def tokenizers_folder(config: Config) -> Path:
    """A data set of a configuration that has all of its tokenizers.

    Raises:
        DataError: none of its data sets exists.
    """
    folder = most_complete(read_blend(config))
    assert folder is not None, "a configuration that is evaluated names data"
    return folder


def encoder_of(config: Config) -> DocumentEncoder:
    """An encoder with the tokenizers of the configuration's data.

    Raises:
        DataError: none of its data sets exists.
    """
    folder = tokenizers_folder(config)
    return DocumentEncoder(
        Vocabulary.from_config(config.vocab),
        text=open_text_tokenizer(folder),
        codecs=open_codecs(folder),
        max_tokens=config.model.seq_length,
    )


def task_items(config: Config) -> dict[str, list[TaskItem]]:
    """The questions that a run is evaluated on, by name (`train.tasks`).

    Raises:
        DataError: as for `named_tasks.named_tasks`; a file holds no questions, or a question is longer than a sequence.
    """
    if not config.train.tasks:
        return {}
    blend = read_blend(config)
    found: dict[str, list[TaskItem]] = {}
    for name, place in named_tasks(config, blend).items():
        if place in blend:
            found[name] = read_task(place, blend[place], name)
        else:
            found[name] = read_questions(place, encoder_of(config))
    longest = max(len(ids) for items in found.values() for item in items for ids in _whole(item))
    if longest - 1 > config.model.seq_length:
        raise DataError(
            f"train.tasks: a question with its answer has {longest} tokens, model.seq_length is "
            f"{config.model.seq_length}",
            remedy="leave it out, or train on longer sequences",
        )
    return found


def _whole(item: TaskItem) -> Iterator[tuple[int, ...]]:
    """The ids of a question with each of its answers."""
    start, end = item.answer
    choices = item.choices or (item.ids[start:end],)
    return ((*item.ids[:start], *choice) for choice in choices)


def _read(file: Path) -> Iterator[_Question]:
    resolve = folder_resolver(file.parent)
    kinds: set[bool] = set()  # whether questions have choices
    try:
        with file.open("rb") as stream:
            number = 0
            while line := stream.readline(_MOST_LINE):
                number += 1
                if line.strip():
                    question = _parsed(line, where=f"{file}:{number}", resolve=resolve)
                    kinds.add(len(question.answers) > 1)
                    yield question
    except OSError as error:
        raise DataError(f"task: {file} cannot be read: {error.strerror}", remedy="correct the path") from error
    if not kinds:
        raise DataError(f"task: {file} holds no questions", remedy=_FORMAT)
    if len(kinds) > 1:
        raise DataError(
            f"task: {file} mixes questions with choices and questions without", remedy="make two files of them"
        )


def _parsed(line: bytes, *, where: str, resolve: Any) -> _Question:
    try:
        record = bounded.parse_json(line)
    except bounded.BAD_CONTENT as error:
        raise DataError(f"task: {where}: not JSON: {error}", remedy=_FORMAT) from error
    if not isinstance(record, dict):
        raise DataError(f"task: {where}: the line is no object", remedy=_FORMAT)
    choices, answer, end = record.pop("choices", None), record.pop("answer", None), record.pop("end", True)
    document = parse_document(record, where=where, fallback_id=where, resolve=resolve, question=True)
    if isinstance(document, Rejected):
        raise DataError(f"task: {where}: {document.reason}", remedy=_FORMAT)
    if not isinstance(end, bool):
        raise DataError(f"task: {where}: end is {end!r}, neither true nor false", remedy=_FORMAT)
    if choices is None:
        if not isinstance(answer, str) or not answer:
            raise DataError(f"task: {where}: there are no choices, and answer is no text", remedy=_FORMAT)
        return _Question(document, (answer,), 0, end)
    texts = choices if isinstance(choices, list) and all(isinstance(one, str) and one for one in choices) else []
    if len(texts) < 2 or len(set(texts)) < len(texts):
        raise DataError(f"task: {where}: choices are no list of at least two different texts", remedy=_FORMAT)
    if type(answer) is not int or not 0 <= answer < len(texts):
        raise DataError(f"task: {where}: answer is {answer!r}, no number from 0 to {len(texts) - 1}", remedy=_FORMAT)
    return _Question(document, tuple(texts), answer, end)


def _encoded(question: _Question, encoder: DocumentEncoder) -> TaskItem:
    """Encodes every answer together with the text before it.

    The ids that all of them begin with belong to the question.

    Answers include the end of the document, `</s>`: otherwise "cat" would be likelier than every name that begins with
    it. A question with `end` false, whose answers are no beginnings of each other, can do without.
    """
    rows = [_ids(_ending_with(question.document, answer), encoder) for answer in question.answers]
    alone = _ids(_answered(question.document), encoder)
    if question.document.answers is not None:  # an answer ends with the message; nothing was trained to follow that
        rows = [row[:-1] for row in rows]
    whole = rows[question.right]
    if not question.end:
        rows = [row[:-1] for row in rows]
    # A single answer is compared with the question alone, which ends with `</s>`; no answer begins with that.
    start = _common(rows if len(rows) > 1 else [whole, alone])
    answers = tuple(row[start:] for row in rows)
    if len(set(answers)) < len(answers) or not all(answers):
        raise DataError(f"task: {question.document.where}: two choices have the same tokens", remedy="make them differ")
    return TaskItem(whole, (start, len(rows[question.right])), answers if len(answers) > 1 else ())


def _answered(document: Document, *answer: Content) -> Document:
    """A question with the pieces of an answer: after the last text, or as the assistant's message."""
    if document.answers is None:
        return replace(document, content=(*document.content, *answer))
    content = (*document.content, Special(ASSISTANT), *answer)
    return replace(document, content=content, answers=(True,) * len(content))


def _ending_with(document: Document, answer: str) -> Document:
    if document.answers is not None:
        return _answered(document, Text(answer), Special(END_OF_TURN))
    *before, last = document.content
    content = (*before, Text(last.text + answer)) if isinstance(last, Text) else (*before, last, Text(answer))
    return replace(document, content=content)


def _ids(document: Document, encoder: DocumentEncoder) -> tuple[int, ...]:
    (encoded,) = encoder.encode([document])
    if not isinstance(encoded, Encoded):
        raise DataError(f"task: {encoded.where}: {encoded.reason}", remedy="mend the document")
    return tuple(encoded.ids.tolist())


def _common(rows: Sequence[tuple[int, ...]]) -> int:
    """Number of ids that all rows begin with, less than the length of the shortest row."""
    number = 0
    shortest = min(map(len, rows))
    while number < shortest - 1 and len({row[number] for row in rows}) == 1:
        number += 1
    return number
