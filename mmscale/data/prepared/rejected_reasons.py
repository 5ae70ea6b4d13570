"""The most frequent reasons in rejected.jsonl."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmscale import bounded

_READ = 100_000  # lines
# What differs between documents with the same fault: paths, quoted texts, numbers.
_OWN = re.compile(r"'[^']*'|\"[^\"]*\"|\S*[/\\.]\S+|\d+")


@dataclass(frozen=True)
class Reason:
    """A reason why documents were rejected.

    Attributes:
        documents: that were rejected for it.
        example: the reason of the first one.
        where: place of the first one.
    """

    documents: int
    example: str
    where: str

    def __str__(self) -> str:
        more = "" if self.documents == 1 else f"{self.documents:,} documents, the first: "
        return f"{more}{self.where}: {self.example}"


def reasons(file: Path, *, most: int = 3) -> list[Reason]:
    """The most frequent reasons, by the words of the reasons without paths, quoted texts and numbers.

    Args:
        file: rejected.jsonl; the first 100,000 lines are read.
        most: number of reasons.
    """
    found: dict[str, Reason] = {}
    for record in _records(file):
        example = str(record.get("reason", ""))
        kind = _OWN.sub("", example)
        first = found.get(kind, Reason(0, example, str(record.get("where", ""))))
        found[kind] = Reason(first.documents + 1, first.example, first.where)
    return sorted(found.values(), key=lambda one: -one.documents)[:most]


def rejected_words(file: Path, documents: int) -> str:
    """`; 194 rejected, see data/rejected.jsonl`, and a line for each frequent reason; "" if there are none.

    Args:
        file: rejected.jsonl.
        documents: number of its lines.
    """
    if not documents:
        return ""
    return "\n  rejected: ".join([f"; {documents} rejected, see {file}", *map(str, reasons(file))])


def _records(file: Path) -> Iterable[dict[str, Any]]:
    with file.open("rb") as opened:
        for number, line in enumerate(bounded.lines(opened)):
            if number == _READ:
                return
            record = bounded.parse_json(line)
            if isinstance(record, dict):
                yield record
