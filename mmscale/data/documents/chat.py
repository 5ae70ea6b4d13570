"""Chat records: messages with roles, in the forms of JSONL files that are in wide use.

    {"messages": [{"role": "user", "content": "Which digit is this?"}, {"role": "assistant", "content": "seven"}]}
    {"conversations": [{"from": "human", "value": "<image>Which digit is this?"}, ...], "image": "7.png"}

The first form is that of OpenAI and of the messages of Hugging Face datasets; its content may be a list of parts, and
`weight: 0` excludes an answer from training. The second form is that of ShareGPT and LLaVA. In a record with `image` or
`images`, each `<image>` in a text stands for the next of them. schema.py makes documents of the result.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mmscale.data.documents.refusal import BadDocumentError
from mmscale.data.vocab import ASSISTANT, SYSTEM, TOOL, USER

# Keys of records that hold a conversation, each with the keys of a message for its role and its content.
CHATS: dict[str, tuple[str, str]] = {"messages": ("role", "content"), "conversations": ("from", "value")}
IMAGES = ("image", "images")  # keys of a chat record with its pictures
PLACEHOLDER = "<image>"
TOKENS_OF_ROLES = {
    "system": SYSTEM,
    "developer": SYSTEM,
    "user": USER,
    "human": USER,
    "assistant": ASSISTANT,
    "gpt": ASSISTANT,
    "tool": TOOL,
    "function": TOOL,
    "observation": TOOL,
}
_OTHER_KEYS = ("weight", "name")  # of a message; `name` is not read
PIECE_KEYS = ("type", "text", "path", "bytes", "modality", "ids")  # of pieces of content, of any type
_TEXT, _IMAGE, _URL = "text", "image", "image_url"

Part = Mapping[str, Any]


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        where: its place in the record, for messages to the user.
        token: that begins it, by its role.
        parts: pieces of its content, as in the `content` of a document; no two texts follow each other.
        trained: whether its tokens are trained on.
    """

    where: str
    token: str
    parts: tuple[Part, ...]
    trained: bool


def chat_key(record: Mapping[str, Any]) -> str | None:
    """The key of the record's conversation; None: it is no chat record.

    Raises:
        BadDocumentError: it has several conversations, or `content` too.
    """
    found = [key for key in ("content", *CHATS) if record.get(key) is not None]
    if len(found) > 1:
        raise BadDocumentError(f"the record has both {found[0]} and {found[1]}")
    return found[0] if found and found[0] in CHATS else None


def messages_of(record: Mapping[str, Any], key: str, ignore: Collection[str]) -> list[Message]:
    """The messages of a chat record.

    Args:
        record: a JSON object, or a row of a table.
        key: from `chat_key`.
        ignore: further keys that a message or a part may have; they are not read.

    Raises:
        BadDocumentError: a message is malformed, or pictures and their places do not match.
    """
    given = record[key]
    if not isinstance(given, list | tuple) or not given:
        raise BadDocumentError(f"{key} is no list of messages")
    pictures = [picture for name in IMAGES for picture in _pictures(record.get(name), name)]
    rest = list(pictures) if pictures else None
    found = [_message(message, f"{key}[{number}]", CHATS[key], rest, ignore) for number, message in enumerate(given)]
    if rest:
        raise BadDocumentError(
            f"the record has {len(pictures)} pictures, and its messages have places ({PLACEHOLDER}) for "
            f"{len(pictures) - len(rest)}"
        )
    return found


def named_files(record: Mapping[str, Any]) -> list[Any]:
    """Values in a chat record that may be paths of files; malformed records give what can be found."""
    found: list[Any] = []
    for name in IMAGES:
        given = record.get(name)
        found += list(given) if isinstance(given, list | tuple) else [given]
    for key, (_, content) in CHATS.items():
        messages = record.get(key)
        for message in messages if isinstance(messages, list | tuple) else ():
            parts = message.get(content) if isinstance(message, Mapping) else None
            for part in parts if isinstance(parts, list | tuple) else ():
                if isinstance(part, Mapping):
                    url = part.get(_URL)
                    found += [part.get("path"), part.get(_IMAGE), url.get("url") if isinstance(url, Mapping) else url]
    paths = [one.get("path") if isinstance(one, Mapping) and not one.get("bytes") else one for one in found]
    return [one for one in paths if isinstance(one, str) and not one.startswith("data:")]


def _message(
    message: Any, where: str, keys: tuple[str, str], rest: list[Part] | None, ignore: Collection[str]
) -> Message:
    if not isinstance(message, Mapping):
        raise BadDocumentError(f"{where} is a {type(message).__name__}, not an object")
    _check_keys(message, where, (*keys, *_OTHER_KEYS, *ignore))
    role, content = message.get(keys[0]), message.get(keys[1])
    token = TOKENS_OF_ROLES.get(role) if isinstance(role, str) else None
    if token is None:
        raise BadDocumentError(f"{where}.{keys[0]} is {role!r}; known are {', '.join(TOKENS_OF_ROLES)}")
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise BadDocumentError(f"{where}.weight is {weight!r}, neither 0 nor 1")
    if isinstance(content, str):
        parts = list(_placed(content, where, rest))
    elif isinstance(content, list | tuple):
        parts = [
            piece for number, part in enumerate(content) for piece in _part(part, f"{where}[{number}]", rest, ignore)
        ]
    else:
        raise BadDocumentError(f"{where}.{keys[1]} is neither a text nor a list of parts")
    joined = tuple(_joined(parts))
    if not joined:
        raise BadDocumentError(f"{where} is empty")
    return Message(where, token, joined, token == ASSISTANT and weight != 0)


def _placed(text: str, where: str, rest: list[Part] | None) -> Iterator[Part]:
    """A text with its pictures. A line break next to a placeholder only separates it from the text."""
    if rest is None:  # a record without pictures: "<image>" is text
        yield {"type": _TEXT, "text": text}
        return
    pieces = text.split(PLACEHOLDER)
    for number, piece in enumerate(pieces):
        if number:
            yield _next(rest, where)
            piece = piece.removeprefix("\n")
        if number + 1 < len(pieces):
            piece = piece.removesuffix("\n")
        yield {"type": _TEXT, "text": piece}


def _next(rest: list[Part] | None, where: str) -> Part:
    if not rest:
        raise BadDocumentError(f"{where} has a place for a picture, and the record has no further one")
    return rest.pop(0)


def _check_keys(given: Mapping[str, Any], where: str, allowed: Collection[str]) -> None:
    """Refuse keys that are not read. Rows of tables have null for missing keys."""
    for key, value in given.items():
        if key not in allowed and value is not None:
            raise BadDocumentError(
                f"{where} has the key {key!r}, which is not read: remove it, or name it in data.prepare.ignore"
            )


def _part(part: Any, where: str, rest: list[Part] | None, ignore: Collection[str]) -> Iterator[Part]:
    """A part of a message in the form of a document's content. Rows of tables have null for missing keys."""
    if not isinstance(part, Mapping):
        raise BadDocumentError(f"{where} is a {type(part).__name__}, not an object")
    _check_keys(part, where, (*PIECE_KEYS, _IMAGE, _URL, *ignore))
    given = {key: value for key, value in part.items() if value is not None and key not in ignore}
    kind = given.get("type")
    if kind == _URL:
        url = given.get(_URL)
        yield _picture(url.get("url") if isinstance(url, Mapping) else url, where)
    elif kind == _IMAGE and not {"path", "bytes"} & given.keys():
        yield _picture(given[_IMAGE], where) if _IMAGE in given else _next(rest, where)
    else:
        yield given


def _joined(parts: list[Part]) -> Iterator[Part]:
    """Neighbouring texts become one, because a chat template has no border between them."""
    text = ""
    for part in parts:
        if part.get("type") == _TEXT and isinstance(part.get("text"), str):
            text += part["text"]
            continue
        if text:
            yield {"type": _TEXT, "text": text}
        text = ""
        yield part
    if text:
        yield {"type": _TEXT, "text": text}


def _pictures(given: Any, name: str) -> list[Part]:
    if given is None:
        return []
    return [_picture(one, name) for one in (given if isinstance(given, list | tuple) else [given])]


def _picture(given: Any, where: str) -> Part:
    """A picture by its path, as a data URI, or as `{bytes, path}`."""
    if isinstance(given, Mapping) and (given.get("bytes") or given.get("path")):
        return {"type": _IMAGE, "bytes": given.get("bytes"), "path": given.get("path")}
    if not isinstance(given, str) or not given:
        raise BadDocumentError(f"{where} is a picture without a path")
    if given.startswith(("http://", "https://")):
        raise BadDocumentError(f"{where} is a picture on the web: download it, and name the file")
    if not given.startswith("data:"):
        return {"type": _IMAGE, "path": given}
    head, _, data = given.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError
        return {"type": _IMAGE, "bytes": base64.b64decode(data, validate=True), "path": where}
    except (ValueError, binascii.Error):
        raise BadDocumentError(f"{where} is a data URI that is not base64") from None
