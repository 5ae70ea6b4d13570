"""Canaries: training documents of random characters, planted in known numbers of copies (`data.prepare.canaries`).

Nothing but memory lets a model predict them. `mmscale eval --task memorisation` measures how much of them it does.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmscale import bounded
from mmscale.config.data.schema import CanariesConfig
from mmscale.data.documents.schema import Document, Text
from mmscale.errors import DataError
from mmscale.runtime.atomic_files import write_atomic

FILE = "canaries.jsonl"  # in the data set's folder: {"id": ..., "copies": n, "text": ...}
_MOST_BYTES = 1 << 28
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


@dataclass(frozen=True)
class Canary:
    """One canary.

    Attributes:
        id: its name; copies add a number.
        copies: number of training documents with its text.
        text: its random characters.
    """

    id: str
    copies: int
    text: str

    @property
    def document(self) -> Document:
        """The document, as it is planted."""
        return Document(self.id, (Text(self.text),), f"canary {self.id}", split="train")


@dataclass(frozen=True)
class CanarySlice:
    """All copies of all canaries, as one slice of a data set's input."""

    settings: CanariesConfig

    @property
    def count(self) -> int:
        """Number of documents."""
        return self.settings.count * sum(self.settings.copies)

    @property
    def identity(self) -> str:
        """The settings, from which everything follows."""
        return f"canaries:{self.settings.model_dump_json()}"

    def read(self) -> Iterator[Document]:
        """The documents; copies of a canary differ in their ids only."""
        for canary in canaries(self.settings):
            for copy in range(canary.copies):
                yield Document(f"{canary.id}-{copy}", canary.document.content, canary.document.where, split="train")


def canaries(settings: CanariesConfig) -> list[Canary]:
    """All canaries; equal settings give equal texts on every machine."""
    found = []
    for copies in settings.copies:
        for number in range(settings.count):
            drawn = random.Random(f"canary {settings.seed} {copies} {number}")
            text = "".join(drawn.choices(_CHARACTERS, k=settings.characters))
            found.append(Canary(f"canary-{copies}-{number}", copies, text))
    return found


def write_canaries(folder: Path, settings: CanariesConfig | None) -> None:
    """Write the list of a data set's canaries, or remove it if there are none."""
    if settings is None:
        (folder / FILE).unlink(missing_ok=True)
        return
    lines = [json.dumps({"id": one.id, "copies": one.copies, "text": one.text}) for one in canaries(settings)]
    write_atomic(folder / FILE, "".join(line + "\n" for line in lines).encode())


def read_canaries(folder: Path) -> Sequence[Canary]:
    """The canaries of a data set; empty if none were planted.

    Raises:
        DataError: their list is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        return ()
    try:
        records = [bounded.parse_json(line) for line in bounded.read_bytes(file, most=_MOST_BYTES).splitlines()]
        return [Canary(str(one["id"]), int(one["copies"]), str(one["text"])) for one in records]
    except (OSError, *bounded.BAD_CONTENT) as error:
        raise DataError(f"data: {file} is damaged: {error}", remedy="run `mmscale data prepare` again") from error
