"""Parts of documents and chat messages from users, before they are converted to token ids.

Shipped next to the weights.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PLACEHOLDER = "<image>"
# Placeholder for the text of a message in a rendered template, with characters of Unicode's private use area.
MARK = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True)
class ImagePart:
    """A piece of a document that is an image, even if it is a string."""

    value: Any


@dataclass(frozen=True)
class ItemPart:
    """A piece of a document of another modality."""

    modality: str
    value: Any


def part_of(piece: Any) -> Any:
    """A piece of `content`: text unchanged, an image wrapped; dictionaries as in chat messages."""
    if not isinstance(piece, dict) or "type" not in piece:
        return piece if isinstance(piece, str) else ImagePart(piece)
    kind = piece["type"]
    if kind == "text":
        return str(piece["text"])
    found = next((piece[key] for key in (kind, "path", "url") if key in piece), None)
    if found is None:
        raise ValueError(
            f'a piece of type {kind!r} is neither {{"type": "text"}} nor {{"type": "image"}}, and says nothing under '
            f"{kind!r} or 'path'"
        )
    return ImagePart(found) if kind == "image" else ItemPart(str(kind), found)


def shown(part: Any) -> str:
    """A part of a conversation as text."""
    if isinstance(part, ItemPart):
        return f"<{part.modality}>"
    return PLACEHOLDER if isinstance(part, ImagePart) else part


def marked_messages(messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages with marks instead of every text and image, and the list of these."""
    pieces: list[Any] = []

    def mark(piece: Any) -> str:
        pieces.append(piece)
        return f"\ue000{len(pieces) - 1}\ue001"

    marked = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            marked.append({**message, "content": mark(content)})
        else:
            texts = [{"type": "text", "text": mark(part_of(piece))} for piece in content]
            marked.append({**message, "content": texts})
    return marked, pieces


def images_in_order(images: Any, counts: list[int]) -> list[Any]:
    """All images, in the order of the placeholders.

    Args:
        images: one image, several, or a list of images for each text.
        counts: placeholders of each text.

    Raises:
        ValueError: there are more or fewer than placeholders.
    """
    several = isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4
    given = list(images) if several else [images]
    if not any(one is None or isinstance(one, list | tuple) for one in given):
        if sum(counts) != len(given):
            raise ValueError(f"the text has {sum(counts)} {PLACEHOLDER} for {len(given)} images")
        return given
    lists = [[] if one is None else list(one) if isinstance(one, list | tuple) else [one] for one in given]
    if len(lists) != len(counts):
        raise ValueError(f"there are {len(counts)} texts and {len(lists)} lists of images")
    for number, (own, count) in enumerate(zip(lists, counts, strict=True)):
        if len(own) != count:
            raise ValueError(f"text {number} has {count} {PLACEHOLDER} for {len(own)} images")
    return [image for own in lists for image in own]


__all__ = ["MARK", "PLACEHOLDER", "ImagePart", "ItemPart", "images_in_order", "marked_messages", "part_of", "shown"]
