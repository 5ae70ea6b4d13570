"""Writes the icons of a theme as documents that read and draw them, and a task: which of ten names does an icon have?

    python examples/icons/write_documents.py debian/usr/share/icons/Tango icons

reads THEME/SIZExSIZE/*/*.png, and writes OUT/documents.jsonl, OUT/which.jsonl and OUT/img. The pictures of one icon in
all sizes are one group, so that none of them is in training while another is held out.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

CHOICES = 10
HELD_OUT = 10  # percent of the names
SMALLEST = 22  # pixels of a picture


def number(*words: str) -> int:
    """The same number for the same words, everywhere."""
    return int(hashlib.sha256("\0".join(words).encode()).hexdigest()[:8], 16)


def pictures(theme: Path) -> list[tuple[str, int, Path]]:
    """Name, edge in pixels and file of every picture; aliases, which are links, are left out."""
    found: list[tuple[str, int, Path]] = []
    for folder in sorted(theme.glob("*x*")):
        match = re.fullmatch(r"(\d+)x\1", folder.name)
        edge = int(match[1]) if match else 0
        files = [file for file in sorted(folder.rglob("*.png")) if not file.is_symlink()] if edge >= SMALLEST else []
        found += [(file.stem.replace("-", " "), edge, file) for file in files]
    return found


def documents(theme: Path, out: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Documents of all icons, and questions about those that are held out."""
    rows, asked = [], {}
    for name, edge, file in pictures(theme):
        split = "validation" if number("split", name) % 100 < HELD_OUT else "train"
        path = f"img/{file.stem}-{edge}.png"
        shutil.copyfile(file, out / path)
        image = {"type": "image", "path": path}
        own = {"group": name, "split": split}
        reads = [image, {"type": "text", "text": f"the icon is {name}"}]
        draws = [{"type": "text", "text": f"draw {name}"}, image]
        rows.append({"id": f"{theme.name} {name} {edge} read", "content": reads} | own)
        rows.append({"id": f"{theme.name} {name} {edge} draw", "content": draws} | own)
        if split == "validation":
            asked[name] = image
    questions = []
    for name, image in asked.items():
        others = sorted((other for other in asked if other != name), key=lambda other, own=name: number(own, other))
        choices = sorted([name, *others[: CHOICES - 1]])
        content = [image, {"type": "text", "text": "the icon is"}]
        answers = [f" {choice}" for choice in choices]
        questions.append({"id": name, "content": content, "choices": answers, "answer": choices.index(name)})
    return rows, questions


def main(theme: Path, out: Path) -> None:
    """Write the files."""
    (out / "img").mkdir(parents=True, exist_ok=True)
    rows, questions = documents(theme, out)
    for name, lines in (("documents", rows), ("which", questions)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (out / f"{name}.jsonl").write_text(text)
        sys.stdout.write(f"{out / name}.jsonl: {len(lines)} lines\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
