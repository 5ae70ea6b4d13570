"""Reads files of torch.save (tensors and plain data), with memory and time bounded by the size of the file.

torch's own restricted reader (`weights_only`) runs no code, but it accepts some content that needs much memory or time.
This module refuses that before reading: compressed records, which torch unpacks before it checks their size; a
`bytearray` of any length; keys nested so that hashing them takes for ever; the format from before 2020, in which a
header determines how much memory is allocated.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from typing import IO, Any, cast

import torch

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_PICKLE = "/data.pkl"
_DEEPEST = 8  # nested tuples; hashing shared ones takes time that doubles with every level
_MANY = 20  # so many tuples are hashed within a second, whatever they share
_TUPLES = (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
_GETS, _PUTS = ("BINGET", "LONG_BINGET"), ("BINPUT", "LONG_BINPUT")


def load(source: Any) -> Any:
    """The content of a file of torch.save, on the host.

    Args:
        source: a path, or a seekable stream.

    Raises:
        pickle.UnpicklingError: it holds more than tensors and plain data, or is not of this format.
        Exception: it is damaged; any exception may occur.
    """
    with weights_only():
        return torch.load(source, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """Inside, torch.load reads as `load` does, regardless of its arguments.

    torch's checkpoint planner passes weights_only=False (default_planner.py, load_bytes).
    """
    before, original = os.environ.get(_FORCE), torch.load

    def checked(source: Any, *arguments: Any, **settings: Any) -> Any:
        _check(source)
        return original(source, *arguments, **settings)

    os.environ[_FORCE] = "1"
    torch.load = checked  # type: ignore[assignment]
    try:
        with torch.serialization.safe_globals([io.BytesIO]):  # megatron's empty `_extra_state` entries
            yield
    finally:
        torch.load = original
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def _check(source: Any) -> None:
    """Refuse content that would need more memory or time than its size justifies.

    Raises:
        pickle.UnpicklingError: names the content.
    """
    is_stream = hasattr(source, "seek")
    begin = source.tell() if is_stream else 0
    try:
        with zipfile.ZipFile(cast(IO[bytes], _View(source)) if is_stream else source) as archive:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
                    raise pickle.UnpicklingError(f"{record.filename} is compressed, which torch.save does not do")
            for record in archive.infolist():
                if record.filename.endswith(_PICKLE):
                    _check_pickle(archive.read(record))
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise pickle.UnpicklingError(f"it is not in the format of torch.save: {error}") from None
    if is_stream:
        source.seek(begin)


class _View:
    """A stream in which zipfile can seek: torch's view of a piece of a file uses the wrong sign for SEEK_END."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        stream.seek(0, os.SEEK_END)
        self._end: int = stream.tell()
        self.tell, self.seekable = stream.tell, stream.seekable

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._end - self.tell())
        return bytes(self._stream.read(left if size < 0 else min(size, left)))

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self._end}[whence]
        if begin + offset < 0:
            raise OSError("a place before the beginning")
        return int(self._stream.seek(begin + offset))


def _check_pickle(content: bytes) -> None:
    many = sum(content.count(code) for code in _TUPLES) > _MANY
    if not many and b"bytearray" not in content:
        return
    try:
        deepest = _deepest_tuple(content)
    except (ValueError, IndexError, KeyError) as error:
        raise pickle.UnpicklingError(f"its pickle is damaged: {error}") from None
    if deepest > _DEEPEST:
        raise pickle.UnpicklingError(f"it holds {deepest} tuples in each other")


def _deepest_tuple(content: bytes) -> int:
    """The deepest nesting of tuples, found by following the pickle's stack without creating an object."""
    stack: list[int] = []  # the depth of each entry; a mark is -1
    memo: dict[int, int] = {}
    deepest = 0
    for code, given, _ in pickletools.genops(content):
        argument: Any = given
        if code.name == "GLOBAL" and argument == "builtins bytearray":
            raise pickle.UnpicklingError("it asks for a bytearray, which may have any length")
        taken = _taken(stack, code)
        inner = max(taken, default=0)
        if code.name in _PUTS:
            memo[argument] = stack[-1]
            continue
        if code.name in _GETS:
            made = memo[argument]
        elif code.code.encode("latin1") in _TUPLES:
            made = inner + 1
        else:
            made = inner
        deepest = max(deepest, made)
        stack.extend([-1] if code.name == "MARK" else [made] * len(code.stack_after))
    return deepest


def _taken(stack: list[int], code: Any) -> list[int]:
    """The depths that an operation removes from the stack."""
    if pickletools.stackslice in code.stack_before:
        mark = len(stack) - 1 - stack[::-1].index(-1)
        taken = stack[mark + 1 :]
        below = len(code.stack_before) - 2  # without the mark and the slice
        taken += stack[mark - below : mark]
        del stack[mark - below :]
        return taken
    number = len(code.stack_before)
    taken = stack[len(stack) - number :]
    del stack[len(stack) - number :]
    return taken
