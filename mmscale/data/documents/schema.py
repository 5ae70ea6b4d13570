"""The schema of interleaved documents: checks that turn a record into a document or a rejection.

readers.py reads files; encode.py makes token ids. No torch here.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from mmscale.data.arrays import parse_array, read_array
from mmscale.data.documents import chat
from mmscale.data.documents.refusal import BadDocumentError
from mmscale.data.vocab import ASSISTANT, END_OF_TURN

TRAIN, VALIDATION = "train", "validation"
# Keys of a record; `metadata` is for the user and is not read.
KEYS = ("id", "content", "loss", "group", "split", "metadata")
CONTENT_KEYS = ("content", *chat.CHATS)  # a record has one of them
QUESTION_KEYS = ("choices", "answer", "end")  # of questions, besides the keys of a document
_IGNORED = " (data.prepare.ignore names keys that are not to be read)"
CHAT_KEYS = (*chat.CHATS, *chat.IMAGES)  # further keys of chat records, instead of `content`
SplitName = Literal["train", "validation"]


@dataclass(frozen=True)
class Text:
    """A piece of text, taken literally: "<boi>" in it is five characters, not a token."""

    text: str


@dataclass(frozen=True, eq=False)
class Item:
    """An item of a modality other than text: a file, the bytes of a file, or its values as an array."""

    source: Path | bytes | NDArray[Any]
    name: str = ""  # for messages
    modality: str = ""


@dataclass(frozen=True, eq=False)
class Image(Item):
    """An image; as an array: pixels uint8 [H, W] or [H, W, C]."""

    modality: str = "image"


@dataclass(frozen=True)
class Tokens:
    """Pre-tokenised content of any modality; ids count from 0 inside the modality's range."""

    modality: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Special:
    """A reserved token of the vocabulary, by its name. Only chat records have them."""

    token: str


Content = Text | Item | Tokens | Special


@dataclass(frozen=True, eq=False)
class Document:
    """One interleaved document.

    Attributes:
        id: name of the document.
        content: pieces in reading order.
        where: file and record, for messages.
        loss: modalities whose labels are trained on; None: all of them.
        split: its split, regardless of its group.
        group: documents of one group are in the same split; None: the id is the group.
        answers: for each piece of content whether it is trained on, as far as `loss` allows; None: all are.
    """

    id: str
    content: tuple[Content, ...]
    where: str
    loss: tuple[str, ...] | None = None
    split: SplitName | None = None
    group: str | None = None
    answers: tuple[bool, ...] | None = None

    def items(self, modality: str) -> tuple[Item, ...]:
        """The document's items of a modality, in order."""
        return tuple(piece for piece in self.content if isinstance(piece, Item) and piece.modality == modality)

    @property
    def images(self) -> tuple[Item, ...]:
        """The document's images in order."""
        return self.items("image")

    def split_for(self, held_out: float) -> SplitName:
        """Its split: `split` if it is set, otherwise determined by a hash of its group or id.

        Args:
            held_out: share of documents for validation, 0..1.
        """
        if self.split is not None:
            return self.split
        decides = self.id if self.group is None else self.group
        fraction = int.from_bytes(hashlib.sha256(decides.encode()).digest()[:8], "big") / 2**64
        return "validation" if fraction < held_out else "train"


@dataclass(frozen=True)
class Rejected:
    """A record that did not become a document: a line of rejected.jsonl."""

    where: str
    id: str
    reason: str


class DocumentSlice(Protocol):
    """A fixed range of records of one input.

    Parts are made of slices, and workers receive them (so they can be pickled).
    """

    @property
    def count(self) -> int:
        """Number of records in the slice (blank lines of a JSONL file are counted, but yield nothing)."""

    @property
    def identity(self) -> str:
        """A string that changes if any record of the slice may have changed."""

    def read(self) -> Iterator[Document | Rejected]:
        """The slice's documents and rejections, always the same in the same order."""


_SHOWN = 200  # longest path in a message [characters]


# Returns the file or the bytes of an item for its path; raises BadDocumentError.
Resolver = Callable[[str], Path | bytes]


def folder_resolver(folder: Path) -> Resolver:
    """A resolver of image paths relative to `folder` that never leaves it.

    Symbolic links are followed before the check, so a link inside the folder to a file outside is refused too.
    """
    root = folder.resolve()

    def resolve(path: str) -> Path:
        clean(path, "image path")
        if "\0" in path:
            raise BadDocumentError("image path holds a NUL character")
        if path.startswith("data:"):
            raise BadDocumentError("image path is a data URI: write the picture into a file, or use parquet with bytes")
        try:
            target = (root / path).resolve()
            if not target.is_relative_to(root):
                raise BadDocumentError(f"image path {path} leaves the folder of its document file")
            if not target.exists():
                raise BadDocumentError(f"image {path} is missing")
            if not target.is_file():  # a FIFO would block a worker for ever
                raise BadDocumentError(f"image {path} is not a regular file")
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name that is too long
            raise BadDocumentError(f"image {path[:_SHOWN]} cannot be found: {error}"[: 2 * _SHOWN]) from error
        return target

    return resolve


def parse_document(
    record: Any,
    *,
    where: str,
    fallback_id: str,
    resolve: Resolver,
    ignore: Collection[str] = (),
    question: bool = False,
) -> Document | Rejected:
    """Check one decoded record and convert it.

    Args:
        record: the JSON object of a line, or a row of the same columns.
        where: file and record, for messages.
        fallback_id: id of a record that has none.
        resolve: finds the files of items.
        ignore: further keys that a record, a message or a piece may have; they are not read.
        question: it is to be answered: a chat record ends before its last answer.
    """
    document_id = fallback_id
    try:
        if not isinstance(record, Mapping):
            raise BadDocumentError(f"the record is a {type(record).__name__}, not an object")
        document_id = _parse_name(record, "id") or fallback_id
        key = chat.chat_key(record)
        own = (*KEYS, *(CHAT_KEYS if key else ()), *ignore)
        if question:
            _check_keys(record, own, (*KEYS, *chat.CHATS, *QUESTION_KEYS))
        else:
            _check_keys(record, own, (*KEYS, *chat.CHATS), elsewhere=_IGNORED)
        answers: tuple[bool, ...] | None = None
        if key is None:
            content = tuple(_parse_items(record.get("content"), resolve, ignore))
        else:
            content, answers = _parse_messages(chat.messages_of(record, key, ignore), resolve, question)
        loss, split = _parse_loss(record.get("loss")), _parse_split(record.get("split"))
        return Document(document_id, content, where, loss, split, _parse_name(record, "group"), answers)
    except BadDocumentError as error:
        return Rejected(where, document_id.encode("utf-8", "replace").decode(), str(error))


def _parse_name(record: Mapping[str, Any], key: str) -> str | None:
    given = record.get(key)
    if given is None:
        return None
    if not isinstance(given, str | int) or isinstance(given, bool):
        raise BadDocumentError(f"{key} is neither a string nor a number")
    if given == "":
        raise BadDocumentError(f"{key} is empty")
    return clean(str(given), key)


def _check_keys(
    record: Mapping[str, Any], allowed: Collection[str], known: Sequence[str], elsewhere: str = "", where: str = ""
) -> None:
    """Refuse unknown keys, which are usually mistakes: `"task"`, `"splits"`. `known`: those that the message names."""
    for key, value in record.items():
        if key in allowed or value is None:
            continue
        near = difflib.get_close_matches(str(key), known, n=1)
        meant = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        raise BadDocumentError(f"{where}unknown key {key!r}: {meant}{elsewhere}")


def _parse_split(split: Any) -> SplitName | None:
    if split is None or split in (TRAIN, VALIDATION):
        return split
    raise BadDocumentError(f"split is {split!r}, neither {TRAIN!r} nor {VALIDATION!r}")


def _parse_messages(
    messages: list[chat.Message], resolve: Resolver, question: bool
) -> tuple[tuple[Content, ...], tuple[bool, ...]]:
    """Pieces of a conversation, and which of them are trained on: answers with the end of the message behind them."""
    content: list[Content] = []
    answers: list[bool] = []
    for message in messages:
        try:
            own = list(_parse_items(message.parts, resolve, ()))
        except BadDocumentError as error:
            raise BadDocumentError(f"{message.where}: {error}") from error
        content += [Special(message.token), *own, Special(END_OF_TURN)]
        answers += [False, *[message.trained] * (len(own) + 1)]
    if question and messages[-1].token == ASSISTANT:
        raise BadDocumentError(f"{messages[-1].where}: a question ends with a message of the user")
    if not question and not any(answers):
        raise BadDocumentError("the conversation has no message of the assistant that is trained on")
    return tuple(content), tuple(answers)


def _parse_items(content: Any, resolve: Resolver, ignore: Collection[str]) -> Iterator[Content]:
    if not isinstance(content, list | tuple):
        raise BadDocumentError("there is no list named content")
    pieces = 0
    for position, item in enumerate(content):
        if not isinstance(item, Mapping):
            raise BadDocumentError(f"content[{position}] is a {type(item).__name__}, not an object")
        parse = _PARSERS.get(item["type"]) if isinstance(item.get("type"), str) else None
        if parse is None:
            *most, last = _PARSERS
            known = f"{', '.join(most)} and {last}"
            raise BadDocumentError(f"content[{position}] has type {item.get('type')!r}; known are {known}")
        _check_keys(
            item, (*chat.PIECE_KEYS, *ignore), chat.PIECE_KEYS, elsewhere=_IGNORED, where=f"content[{position}]: "
        )
        if (piece := parse(item, position, resolve)) is not None:
            pieces += 1
            yield piece
    if not pieces:
        raise BadDocumentError("the document is empty")


def _parse_text(item: Mapping[str, Any], position: int, resolve: Resolver) -> Text | None:
    text = item.get("text")
    if not isinstance(text, str):
        raise BadDocumentError(f"content[{position}] is text without a string named text")
    return Text(clean(text, f"content[{position}].text")) if text else None


def _parse_file(item: Mapping[str, Any], position: int, resolve: Resolver) -> Item:
    """`{"type": MODALITY, "path": ...}`; parquet files may hold the file itself as `bytes`."""
    kind, data, path = item["type"], item.get("bytes"), item.get("path")
    made: Callable[..., Item] = Image if kind == "image" else functools.partial(Item, modality=kind)
    if isinstance(data, bytes) and data:
        return made(data, path if isinstance(path, str) else f"content[{position}]")
    if not isinstance(path, str) or not path:
        raise BadDocumentError(f"content[{position}] is {article(kind)} without a path")
    return made(resolve(path), path)


def article(kind: str) -> str:
    """The name of a modality with its indefinite article."""
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def _parse_tokens(item: Mapping[str, Any], position: int, resolve: Resolver) -> Tokens:
    modality, ids, path = item.get("modality"), item.get("ids"), item.get("path")
    if not isinstance(modality, str):
        raise BadDocumentError(f"content[{position}] holds tokens without the name of a modality")
    if ids is None and isinstance(path, str):
        return Tokens(modality, _stored_ids(path, resolve))
    if not isinstance(ids, list | tuple) or not ids:
        raise BadDocumentError(f"content[{position}] holds tokens without a list of ids")
    if not all(type(number) is int and number >= 0 for number in ids):  # bool is an int, too
        raise BadDocumentError(f"content[{position}].ids holds something else than whole numbers from 0")
    return Tokens(modality, tuple(ids))


def _stored_ids(path: str, resolve: Resolver) -> tuple[int, ...]:
    """Codes of an item in a .npy file, of any shape."""
    found = resolve(path)
    try:
        array = read_array(found) if isinstance(found, Path) else parse_array(found)
    except (OSError, ValueError) as error:
        raise BadDocumentError(f"tokens {path} cannot be read: {error}") from error
    if array.dtype.kind not in "iu" or not array.size or array.min() < 0:
        raise BadDocumentError(f"tokens {path} hold something else than whole numbers from 0")
    return tuple(array.ravel().tolist())


_PARSERS: dict[str, Callable[[Mapping[str, Any], int, Resolver], Content | None]] = {
    "text": _parse_text,
    "image": _parse_file,
    "tokens": _parse_tokens,
}
# The modality of a file in a WebDataset sample, by its suffix.
SUFFIXES: dict[str, str] = dict.fromkeys(
    ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm"), "image"
)


def know_modality(name: str, suffixes: Iterable[str]) -> None:
    """Allow items `{"type": name, "path": ...}` in documents; called by the table of modalities.

    Args:
        name: the modality.
        suffixes: of its files in WebDataset archives, lower case, without the dot.
    """
    others = {key: value for key, value in _PARSERS.items() if key not in (name, "tokens")}
    parsers = {**others, name: _parse_file, "tokens": _parse_tokens}
    _PARSERS.clear()
    _PARSERS.update(parsers)
    SUFFIXES.update(dict.fromkeys(suffixes, name))


def named_files(record: Any) -> list[Any]:
    """Values in a record that may be paths of files, so that changes of these files are noticed; any record is allowed.

    Raises:
        TypeError, KeyError, AttributeError: it is no record.
    """
    content = record.get("content")
    if content is None:
        return chat.named_files(record)
    return [one.get("path") for one in content if isinstance(one, Mapping) and not one.get("bytes")]


def _parse_loss(loss: Any) -> tuple[str, ...] | None:
    if loss is None or loss == "all":
        return None
    names = (loss,) if isinstance(loss, str) else loss
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        raise BadDocumentError('loss is neither "all", nor the name of a modality, nor a list of such names')
    return tuple(names)


def clean(text: str, what: str) -> str:
    """The text, after refusing half surrogate pairs: JSON may contain them, but tokenizers and UTF-8 files cannot.

    Args:
        text: of a document.
        what: names it in the message.

    Raises:
        BadDocumentError: it has one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadDocumentError(f"{what} holds half of a surrogate pair") from error
    return text
