"""Questions defined by a data set: documents with one span as the answer, and the answers to choose from.

mmscale.train.steps.task_scores evaluates them. No torch here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmscale import bounded
from mmscale.data.prepared.manifest import MOST_BYTES, Manifest
from mmscale.errors import DataError
from mmscale.runtime.atomic_files import write_atomic

FOLDER = "tasks"


@dataclass(frozen=True)
class TaskItem:
    """One question.

    Attributes:
        ids: the whole document with the correct answer.
        answer: half-open span of the answer in `ids`.
        choices: ids of every possible answer, to be inserted in that place; one of them is `ids[start:end]`. Empty: the
            model must write exactly the answer.
    """

    ids: tuple[int, ...]
    answer: tuple[int, int]
    choices: tuple[tuple[int, ...], ...]

    @property
    def right(self) -> int:
        """Index of the correct answer in `choices`."""
        start, end = self.answer
        return self.choices.index(self.ids[start:end])


def said_twice(items: Sequence[TaskItem]) -> str:
    """Says how many questions equal an earlier one, and so count several times; empty if none does."""
    again = len(items) - len(set(items))
    return f"; {again:,} of the questions equal an earlier one and count again" if again else ""


def write_task(file: Path, items: Sequence[TaskItem]) -> None:
    """Write a task's JSONL, atomically."""
    file.parent.mkdir(exist_ok=True)
    lines = [json.dumps({"ids": item.ids, "answer": item.answer, "choices": item.choices}) for item in items]
    write_atomic(file, "".join(line + "\n" for line in lines).encode())


def read_task(folder: Path, manifest: Manifest, name: str) -> list[TaskItem]:
    """The questions of a task.

    Args:
        folder: the data set.
        manifest: its manifest.
        name: name of the task.

    Raises:
        DataError: the data set has no such task, or its file is missing or damaged.
    """
    found = [task for task in manifest.tasks if task.name == name]
    if not found:
        known = ", ".join(task.name for task in manifest.tasks) or "none"
        raise DataError(f"data: {folder} has no task {name!r} (it has: {known})", remedy="name one of these")
    file = folder / found[0].file
    items = []
    try:
        for line in bounded.read_bytes(file, most=MOST_BYTES).splitlines():
            fields = bounded.parse_json(line)
            start, end = fields["answer"]
            item = TaskItem(tuple(fields["ids"]), (start, end), tuple(tuple(choice) for choice in fields["choices"]))
            if item.choices:
                item.right  # noqa: B018  raises if the answer is none of the choices
            items.append(item)
    except (OSError, *bounded.BAD_CONTENT) as error:
        raise DataError(f"data: {file} is damaged: {error}", remedy="run `mmscale data prepare` again") from error
    return items


def identities_of(tasks: Mapping[str, Sequence[TaskItem]]) -> list[dict[str, str]]:
    """What checkpoints store about the tasks of a run: name, and a hash of questions and answers without paths."""
    return [{"name": name, "identity": _identity(items)} for name, items in tasks.items()]


def replaced(before: Iterable[Mapping[str, Any]], now: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line for each task whose questions have changed since a checkpoint was written.

    Args:
        before: tasks in the checkpoint, from `identities_of`.
        now: the present tasks; new ones are not compared.
    """
    kept = {one["name"]: one["identity"] for one in before}
    return [
        f"task {one['name']}: other questions or answers, its accuracies are not comparable with earlier ones"
        for one in now
        if kept.get(one["name"], one["identity"]) != one["identity"]
    ]


def _identity(items: Sequence[TaskItem]) -> str:
    content = json.dumps([[item.ids, item.answer, item.choices] for item in items])
    return hashlib.sha256(content.encode()).hexdigest()[:16]
