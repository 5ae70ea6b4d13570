"""Prompts: the beginnings of documents, as pieces for the processor; refuses characters that a tokenizer would drop."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmscale import bounded
from mmscale.data.vocab import IMAGE
from mmscale.errors import DataError, UsageError


@dataclass(frozen=True)
class Prompt:
    """The beginning of a document.

    Attributes:
        text: each `<image>` (`<audio>`, ...) in it is replaced by the next file of that modality; without any, files
            come before the text.
        images: files.
        draw: an image must follow.
        items: files of other modalities, each with the name of its modality.
        begin: the modality of an item that must follow; "": none.
        chat: it is a message of the user, and the assistant's answer follows.
    """

    text: str
    images: tuple[Path, ...] = ()
    draw: bool = False
    items: tuple[tuple[str, Path], ...] = ()
    begin: str = ""
    chat: bool = False

    @property
    def opens(self) -> str:
        """The modality that must follow; "": the model decides."""
        return "image" if self.draw else self.begin

    @property
    def files(self) -> tuple[tuple[str, Path], ...]:
        """All files with their modalities."""
        return (*(("image", file) for file in self.images), *self.items)


def document_of(prompt: Prompt) -> list[Any]:
    """Texts, images (paths) and files of other modalities (as in chat messages) in order.

    Raises:
        UsageError: the text has placeholders for another number of files.
    """
    waiting: dict[str, list[Any]] = {}
    for name, file in prompt.files:
        waiting.setdefault(name, []).append(file if name == IMAGE else {"type": name, "path": file})
    if not waiting:
        return [prompt.text] if prompt.text else []
    first: list[Any] = []
    parts = re.split(f"<({'|'.join(map(re.escape, waiting))})>", prompt.text)
    for name, files in waiting.items():
        asked = parts[1::2].count(name)
        if not asked:
            first += files
            waiting[name] = []
        elif asked != len(files):
            option = "--image" if name == IMAGE else "--item"
            raise UsageError(
                f"the prompt has {asked} <{name}> for {len(files)} {name}s",
                remedy=f"give as many {option}, or none of <{name}> to have them before the text",
            )
    rest = [waiting[part].pop(0) if odd % 2 else part for odd, part in enumerate(parts) if odd % 2 or part]
    return [*first, *rest]


def parts_of(document: list[Any]) -> list[Any]:
    """The pieces of `document_of` as the content of a chat message."""
    found = []
    for piece in document:
        if isinstance(piece, str):
            found.append({"type": "text", "text": piece})
        else:
            found.append(piece if isinstance(piece, dict) else {"type": IMAGE, "image": piece})
    return found


def refuse_unknown_characters(tokenizer: Any, text: str) -> None:
    """Refuse characters that the tokenizer would drop or replace by one token for everything unknown.

    Raises:
        DataError: there are such characters.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"the prompt {text!r} is no valid UTF-8", remedy="check the terminal's encoding") from None
    unknown_id = tokenizer.backend_tokenizer.token_to_id(_unknown_token(tokenizer) or "")
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    covered: set[int] = set()
    unknown: set[str] = set()
    for number, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        covered.update(range(start, end))
        if unknown_id is not None and number == unknown_id:
            unknown.add(text[start:end])
    unknown |= {one for at, one in enumerate(text) if at not in covered and not one.isspace()}
    if unknown:
        raise DataError(
            f"the text tokenizer does not know {', '.join(map(repr, sorted(unknown)[:5]))}",
            remedy="write the prompt with characters of the training data",
        )


def _unknown_token(tokenizer: Any) -> str | None:
    """The token for everything unknown, from the tokenizer's model."""
    found: str | None = bounded.parse_json(tokenizer.backend_tokenizer.to_str())["model"].get("unk_token")
    return found
