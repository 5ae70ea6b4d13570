"""Pickles inside a checkpoint, read without running what they say.

torch's `.metadata` is a raw pickle, and megatron-core loads it as one: it is read here first, with only the classes
that belong into it. Tensors and `common.pt` go through torch's own restricted reader.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Iterator
from enum import EnumType
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from mmscale.errors import CheckpointError

METADATA = ".metadata"
_DCP = "torch.distributed.checkpoint"
# What megatron-core 0.16.1 writes with torch 2.6 to 2.13. Plain data: creating any of these runs no foreign code.
_ALLOWED = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),  # a look-up of "strided", "sparse_coo", ...
    (f"{_DCP}.filesystem", "_StorageInfo"),
    *(
        (f"{_DCP}.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    *((f"{_DCP}.planner", name) for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")),
}
_GETATTR = {("builtins", "getattr"), ("__builtin__", "getattr")}  # the second in protocols below 3
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in _GETATTR:
            return _member
        raise pickle.UnpicklingError(f"{module}.{name}")


def _member(owner: Any, name: Any) -> Any:
    """What Python 3.11.0 to 3.11.3 pickles a member of an enumeration as: getattr(enumeration, name)."""
    if isinstance(owner, EnumType) and name in owner.__members__:
        return owner[name]
    raise pickle.UnpicklingError("builtins.getattr")


def read_metadata(folder: Path) -> Metadata:
    """The index of a checkpoint's tensors.

    Raises:
        CheckpointError: it cannot be read, names something that is no part of an index, or leads out of the folder.
    """
    file = folder / METADATA
    remedy = "do not use it, and find out where it comes from; choose another checkpoint: RUN@STEP"
    try:
        metadata = _Unpickler(io.BytesIO(file.read_bytes())).load()
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{file} wants to load {error}, which no checkpoint needs", remedy=remedy) from None
    except Exception as error:  # a damaged pickle raises anything
        raise CheckpointError(f"{file} cannot be read: {type(error).__name__}: {error}", remedy=remedy) from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"{file} holds no index of tensors", remedy=remedy)
    for name in {str(getattr(info, "relative_path", "")) for info in metadata.storage_data.values()}:
        _check_inside(folder, name, remedy=remedy)
    return metadata


def _check_inside(folder: Path, name: str, *, remedy: str) -> None:
    path = PurePosixPath(name)
    escapes = not name or path.is_absolute() or ".." in path.parts or "\\" in name
    if escapes or any((folder / part).is_symlink() for part in (path, *path.parents)):
        raise CheckpointError(f"{folder / METADATA} names the file {name!r}, outside of the checkpoint", remedy=remedy)


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """Inside, torch.load makes tensors and plain data only, whatever its caller asks for.

    torch's checkpoint planner asks for weights_only=False (default_planner.py, load_bytes).
    """
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals([io.BytesIO]):  # megatron's empty `_extra_state` entries
            yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before
