"""Reads small files and texts that come from outside: a run folder, a data set, a model folder, a user.

Whatever they hold, reading takes little memory and time, and ends with the content or with an OSError or a ValueError
of one line. What the content means is the caller's business, who catches BAD_CONTENT around it. No torch, no numpy.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import TypeAdapter

MOST_BYTES = 64 << 20  # of a file, unless its reader knows better; the largest of ours have a few MB
LONGEST_LINE = 16 << 20  # bytes
DEEPEST = 64  # lists and objects in each other; ours have less than 20
# What reading the fields of an object raises that may be of any shape.
BAD_CONTENT = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)

_DIGITS = 64  # of a whole number: what counts has less than 20, what is random up to 40
_HUGE = re.compile(rf"[0-9]{{{_DIGITS}}}")
_HUGE_BYTES = re.compile(_HUGE.pattern.encode())


T = TypeVar("T")


class BoundsError(ValueError):
    """A file or text is larger, deeper or of another kind than what is read."""


def read_bytes(path: Path, *, most: int = MOST_BYTES) -> bytes:
    """The content of a regular file.

    Args:
        path: of the file.
        most: its largest size [bytes].

    Raises:
        OSError: it is missing or cannot be read.
        BoundsError: it is larger, or a pipe, a device or a socket, which might never end.
    """
    # O_NONBLOCK: opening a pipe would wait for its writer.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise BoundsError("it is not a regular file")
        if status.st_size > most:
            raise BoundsError(f"it has {status.st_size:,} bytes, more than the {most:,} that are read")
        return file.read()


def read_text(path: Path, *, most: int = MOST_BYTES) -> str:
    """The text of a file in UTF-8; errors as in `read_bytes`, and ValueError where it is not UTF-8."""
    return read_bytes(path, most=most).decode("utf-8")


def read_json(path: Path, *, most: int = MOST_BYTES) -> Any:
    """What a file of JSON holds; errors as in `read_text` and `parse_json`."""
    return parse_json(read_text(path, most=most))


def read_object(path: Path, *, most: int = MOST_BYTES) -> dict[str, Any]:
    """The JSON object in a file; errors as in `read_json`, and ValueError where it is something else."""
    found = read_json(path, most=most)
    if not isinstance(found, dict):
        raise BoundsError("it holds no JSON object")
    return found


def parse_json(text: str | bytes) -> Any:
    """What a text of JSON says.

    Raises:
        ValueError: it is not JSON.
        BoundsError: it is nested deeper than DEEPEST, or a whole number has more than 64 digits.
    """
    huge = _HUGE.search(text) if isinstance(text, str) else _HUGE_BYTES.search(text)
    try:
        found = json.loads(text, parse_int=_whole if huge else None)
    except RecursionError:
        raise _too_deep() from None
    opened = text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")
    if opened > DEEPEST and not _is_shallow(found):
        raise _too_deep()
    return found


def read_record(kind: type[T], path: Path) -> T:
    """A dataclass from a file of JSON.

    Errors as in `read_object` and `record`.
    """
    return record(kind, read_object(path))


def record(kind: type[T], fields: Any) -> T:
    """A dataclass from its fields.

    Raises:
        ValueError: they are not those of the dataclass, or not of its types.
    """
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(fields, dict) or not fields.keys() <= known:
        raise BoundsError(f"it holds other fields than {', '.join(sorted(known))}")
    found: T = _adapter(kind).validate_python(fields)  # type: ignore[arg-type]
    return found


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def lines(file: BinaryIO, *, longest: int = LONGEST_LINE) -> Iterator[bytes]:
    """Lines of a file, ends included; a longer one comes in pieces, so that a file without line ends fits in memory."""
    while line := file.readline(longest):
        yield line


def _whole(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise BoundsError(f"a whole number of {len(digits)} digits")
    return int(digits)


def _too_deep() -> BoundsError:
    return BoundsError(f"it is nested more than {DEEPEST} deep")


def _is_shallow(value: Any) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return True
    return False
