"""Reads small files and texts of untrusted origin within bounds of size, depth and kind.

Any content takes little memory and time to read. The result is the content, or an OSError or a ValueError with a
one-line message. The caller interprets the content and catches BAD_CONTENT around that. No torch, no numpy.
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

MOST_BYTES = 64 << 20  # largest file, unless the reader sets another limit; mmscale's own files have a few MB at most
LONGEST_LINE = 16 << 20  # bytes
DEEPEST = 64  # largest nesting of lists and objects; mmscale's own have less than 20
# Exceptions that reading the fields of an object of unknown shape may raise.
BAD_CONTENT = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)

_DIGITS = 64  # largest number of digits of an integer: counts have less than 20, random numbers up to 40
_HUGE = re.compile(rf"[0-9]{{{_DIGITS}}}")
_HUGE_BYTES = re.compile(_HUGE.pattern.encode())


T = TypeVar("T")


class BoundsError(ValueError):
    """A file or text is too large, nested too deeply, or of another kind."""


def read_bytes(path: Path, *, most: int = MOST_BYTES) -> bytes:
    """The content of a regular file.

    Args:
        path: of the file.
        most: its largest size [bytes].

    Raises:
        OSError: it is missing or cannot be read.
        BoundsError: it is larger, or it is a pipe, a device or a socket, which may have no end.
    """
    # O_NONBLOCK: otherwise opening a pipe would wait for its writer.
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
    """The text of a UTF-8 file. Errors as in `read_bytes`, and ValueError if it is not UTF-8."""
    return read_bytes(path, most=most).decode("utf-8")


def read_json(path: Path, *, most: int = MOST_BYTES) -> Any:
    """The content of a JSON file. Errors as in `read_text` and `parse_json`."""
    return parse_json(read_text(path, most=most))


def read_object(path: Path, *, most: int = MOST_BYTES) -> dict[str, Any]:
    """The JSON object in a file. Errors as in `read_json`, and ValueError if it is not an object."""
    found = read_json(path, most=most)
    if not isinstance(found, dict):
        raise BoundsError("it holds no JSON object")
    return found


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON.
        BoundsError: it is nested deeper than DEEPEST, or an integer has more than 64 digits.
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
    """A dataclass from a JSON file. Errors as in `read_object` and `record`."""
    return record(kind, read_object(path))


def record(kind: type[T], fields: Any) -> T:
    """A dataclass from its fields.

    Raises:
        ValueError: the fields are not those of the dataclass, or have wrong types.
    """
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(fields, dict) or not fields.keys() <= known:
        raise BoundsError(f"it holds other fields than {', '.join(sorted(known))}")
    found: T = _adapter(kind).validate_python(fields)  # type: ignore[arg-type]
    return found


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines of a file with their line ends.

    A longer line is split, so that a file without line ends needs little memory.
    """
    while line := file.readline(LONGEST_LINE):
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
