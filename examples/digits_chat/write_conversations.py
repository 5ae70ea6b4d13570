"""Writes conversations about handwritten digits, and questions to ask a model on digits that it has not seen.

    python examples/digits_chat/write_conversations.py data/digits-documents data/digits-chat

The training split of the digits (examples/digits/write_documents.py) gives conversations.jsonl: a picture with the
question which digit it is, the same with a second question (even or odd), and a request to draw a digit. The held-out
pictures give digit.jsonl and even.jsonl, tasks for `train.tasks`, `sft.tasks` and `mmscale eval --task`. The same
arguments write the same bytes.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmscale import bounded

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ORIGINAL = re.compile(r"digits-\d+-0-describe")  # ids of one document of every image that is not shifted
ASK = ("Which digit is this?", "What number did somebody write here?")
EVEN = "Is it even or odd?"
DRAW = "Please draw the digit {}."
KINDS = ("even", "odd")


def labelled(documents: Path, split: str) -> Iterator[tuple[Path, int]]:
    """Pictures and digits of one split."""
    for line in (documents / "documents.jsonl").read_text().splitlines():
        document = bounded.parse_json(line)
        if document["split"] == split and ORIGINAL.fullmatch(document["id"]):
            picture, caption = document["content"]
            yield documents / picture["path"], WORDS.index(caption["text"].split()[-1])


def message(role: str, *parts: str | Path) -> dict[str, Any]:
    """A message; a path is a picture."""
    content = [
        {"type": "image", "path": part.name} if isinstance(part, Path) else {"type": "text", "text": part}
        for part in parts
    ]
    return {"role": role, "content": content}


def conversation(number: int, digit: int, picture: Path) -> dict[str, Any]:
    """The conversation about a picture: every third one asks for a drawing."""
    if number % 3 == 2:
        messages = [message("user", DRAW.format(WORDS[digit])), message("assistant", picture)]
    else:
        messages = [message("user", picture, ASK[number % 2]), message("assistant", WORDS[digit])]
        if number % 3 == 1:
            messages += [message("user", EVEN), message("assistant", KINDS[digit % 2])]
    return {"id": f"chat-{number}", "messages": messages}


def questions(digit: int, picture: Path) -> dict[str, dict[str, Any]]:
    """The questions of each task about a held-out picture."""
    shown = message("user", picture, ASK[0])
    second = [shown, message("assistant", WORDS[digit]), message("user", EVEN)]
    return {
        "digit": {"messages": [shown], "choices": list(WORDS), "answer": digit},
        "even": {"messages": second, "choices": list(KINDS), "answer": digit % 2},
    }


def main(arguments: list[str]) -> int:
    """Write pictures, conversations and tasks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("documents", type=Path, help="folder of examples/digits/write_documents.py")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--conversations", type=int, default=1200, help="number of conversations (default 1200)")
    asked = parser.parse_args(arguments)
    asked.out.mkdir(parents=True, exist_ok=True)
    files: dict[str, list[dict[str, Any]]] = {"conversations": [], "digit": [], "even": []}
    for split in ("train", "validation"):
        for number, (original, digit) in enumerate(labelled(asked.documents, split)):
            held_out = split == "validation"
            if not held_out and number >= asked.conversations:
                break
            picture = asked.out / f"{'held_out' if held_out else 'train'}_{number:04d}.png"
            shutil.copyfile(original, picture)
            if not held_out:
                files["conversations"].append(conversation(number, digit, picture))
                continue
            for task, question in questions(digit, picture).items():
                files[task].append(question)
    for name, records in files.items():
        (asked.out / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    counts = ", ".join(f"{len(records)} {name}" for name, records in files.items())
    sys.stdout.write(f"{asked.out}: {counts}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
