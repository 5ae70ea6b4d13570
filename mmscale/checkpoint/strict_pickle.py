"""Reads a pickle that holds an index of tensors, and refuses every operation that an index does not need.

It interprets pickle operations one by one. Objects are created only from a few classes, attributes are set only on
objects that the pickle itself created, and classes, functions and members of enumerations are never modified.
pickles.py checks whether the resulting object is an index.
"""

from __future__ import annotations

import gc
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from enum import EnumType
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

# The classes in indices written by megatron-core 0.16.1 with torch 2.6 to 2.13.
_RECORDS: tuple[type, ...] = (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    SavePlan,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
    TensorWriteData,
    WriteItem,
    _StorageInfo,
)
_ENUMERATIONS: tuple[EnumType, ...] = (_MEM_FORMAT_ENCODING, WriteItemType)
_LAYOUTS = {"torch.strided": torch.strided, "torch.sparse_coo": torch.sparse_coo}
_GETATTR = {("builtins", "getattr"), ("__builtin__", "getattr")}  # the second in protocols below 3
_PROPERTIES = (torch.dtype, torch.layout, bool, _MEM_FORMAT_ENCODING, bool)
_DEEPEST_KEY = 3  # nested tuples; hashing shared ones takes time that doubles with every level


def load(content: bytes) -> Any:
    """The object in a pickle.

    Raises:
        pickle.UnpicklingError: it refers to a name or an operation that no index needs.
        Exception: it is damaged; any exception may occur.
    """
    collects = gc.isenabled()
    gc.disable()  # half of the time would be spent on searching a million new objects for cycles
    try:
        return _Unpickler(io.BytesIO(content)).load()
    finally:
        if collects:
            gc.enable()


def _layout(name: Any) -> torch.layout:
    return _LAYOUTS[name]


def _member(owner: Any, name: Any) -> Any:
    """How Python 3.11.0 to 3.11.3 pickles a member of an enumeration: getattr(enumeration, name)."""
    if any(owner is known for known in _ENUMERATIONS) and type(name) is str and name in owner.__members__:
        return owner[name]
    raise pickle.UnpicklingError("builtins.getattr")


def _no_path(*parts: Any) -> None:
    """Replaces a path: torch's writer stores the folder that it wrote to (StorageMeta), which is not needed."""


_GLOBALS: dict[tuple[str, str], Any] = {
    **{(kind.__module__, kind.__qualname__): kind for kind in (*_RECORDS, *_ENUMERATIONS)},
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _layout,
    **dict.fromkeys(_GETATTR, _member),
    ("pathlib", "PosixPath"): _no_path,
    ("pathlib._local", "PosixPath"): _no_path,  # Python 3.13
}
_MADE = {id(known) for known in _RECORDS}  # by identity, because comparing objects from a pickle could run their code


def _called(function: Any, arguments: Any) -> bool:
    """Whether an index needs this call, and its arguments are cheap."""
    if type(arguments) is not tuple:
        return False
    if function is OrderedDict:
        return len(arguments) == 0
    if function is _member:
        return len(arguments) == 2
    if function is _no_path:
        return all(type(part) is str for part in arguments)
    if len(arguments) != 1:
        return False
    if function is torch.Size:
        return type(arguments[0]) in (tuple, list) and all(type(size) is int for size in arguments[0])
    return any(function is known for known in (_layout, *_ENUMERATIONS)) and type(arguments[0]) in (int, str)


_Base: Any = pickle._Unpickler  # type: ignore[attr-defined]  # the one in C has no operations to override


class _Unpickler(_Base):
    dispatch: ClassVar[dict[int, Any]] = dict(_Base.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _GLOBALS:
            return _GLOBALS[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name}")

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is TensorProperties and type(state) is tuple and _types(state) == _PROPERTIES:
            target.__setstate__(state)
            return
        if id(type(target)) not in _MADE or type(state) is not dict or not all(type(name) is str for name in state):
            raise pickle.UnpicklingError(f"a state into {_name(target)}")
        # Of an object that this pickle created; special methods are looked up in its class, so they cannot be replaced.
        target.__dict__.update(state)

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack[-1]
        if not _called(function, arguments):
            raise pickle.UnpicklingError(f"a call of {_name(function)}")
        self.stack[-1] = function(*arguments)

    def load_newobj(self) -> None:
        arguments = self.stack.pop()
        kind = self.stack.pop()
        if id(kind) not in _MADE or arguments != ():
            raise pickle.UnpicklingError(f"an object of {_name(kind)}")
        self.append(object.__new__(kind))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([key, value])

    def load_setitems(self) -> None:
        self._fill(self.pop_mark())

    def _fill(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, OrderedDict) or not all(_is_key(key) for key in items[::2]):
            raise pickle.UnpicklingError(f"items into {_name(target)}")
        target.update(zip(items[::2], items[1::2], strict=True))

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._fill(items)

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def load_append(self) -> None:
        self._extend([self.stack.pop()])

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise pickle.UnpicklingError(f"items into {_name(target)}")
        target.extend(items)

    def refuse(self) -> None:
        raise pickle.UnpicklingError("a kind of object")


def _own(code: bytes, method: Callable[[Any], None]) -> None:
    _Unpickler.dispatch[code[0]] = method


_own(pickle.BUILD, _Unpickler.load_build)
_own(pickle.REDUCE, _Unpickler.load_reduce)
_own(pickle.NEWOBJ, _Unpickler.load_newobj)
_own(pickle.SETITEM, _Unpickler.load_setitem)
_own(pickle.SETITEMS, _Unpickler.load_setitems)
_own(pickle.DICT, _Unpickler.load_dict)
_own(pickle.APPEND, _Unpickler.load_append)
_own(pickle.APPENDS, _Unpickler.load_appends)
for _code in (
    pickle.NEWOBJ_EX,
    pickle.INST,
    pickle.OBJ,
    pickle.EXT1,
    pickle.EXT2,
    pickle.EXT4,
    pickle.PERSID,
    pickle.BINPERSID,
    pickle.ADDITEMS,
    pickle.EMPTY_SET,
    pickle.FROZENSET,
    pickle.BYTEARRAY8,
    pickle.NEXT_BUFFER,
    pickle.READONLY_BUFFER,
):
    _own(_code, _Unpickler.refuse)


def _is_key(key: Any) -> bool:
    """Whether hashing a key is cheap."""
    if type(key) is MetadataIndex:
        return all(_is_key(part) for part in vars(key).values())
    return _is_flat(key, 0)


def _is_flat(key: Any, depth: int) -> bool:
    if type(key) in (tuple, torch.Size):
        return depth < _DEEPEST_KEY and all(_is_flat(part, depth + 1) for part in key)
    return key is None or type(key) in (str, int, bool)


def _types(values: tuple[Any, ...]) -> tuple[type, ...]:
    return tuple(type(value) for value in values)


def _name(thing: Any) -> str:
    """A name for messages that evaluates nothing of the object."""
    kind = thing if isinstance(thing, type) else type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"
