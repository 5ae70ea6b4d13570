"""Reads documents from CSV files: a column of text, and perhaps one with paths of pictures."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class CsvReader:
    """The reader.

    Args:
        text: name of the column of text.
        image: name of the column with paths of pictures, relative to the file; "": there is none.
    """

    def __init__(self, *, text: str = "text", image: str = "") -> None:
        self.text, self.image = text, image

    def count(self, file: Path) -> int:
        """Records of a file."""
        with file.open(encoding="utf-8-sig", newline="") as stream:
            return sum(1 for _ in csv.DictReader(stream))

    def read(self, file: Path, first: int, count: int) -> Iterator[dict[str, Any]]:
        """Records first..first+count-1, as they would be in a JSONL file."""
        with file.open(encoding="utf-8-sig", newline="") as stream:
            for row in itertools.islice(csv.DictReader(stream), first, first + count):
                content = [{"type": "text", "text": row[self.text]}]
                if self.image and row[self.image]:
                    content.append({"type": "image", "path": row[self.image]})
                yield {"content": content}
