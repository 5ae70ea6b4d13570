"""Pickles inside a checkpoint, read without running what they say.

torch's `.metadata` is a raw pickle. It is read by strict_pickle.py, and megatron-core is given the object that came
out, so that it never unpickles the file itself. Tensors and `common.pt` go through torch's own restricted reader.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import os
import pickle
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from mmscale.checkpoint import strict_pickle
from mmscale.errors import CheckpointError

METADATA = ".metadata"
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def read_metadata(folder: Path) -> Metadata:
    """The index of a checkpoint's tensors.

    Raises:
        CheckpointError: it cannot be read, names something that is no part of an index, or leads out of the folder.
    """
    file = folder / METADATA
    remedy = "do not use it, and find out where it comes from; choose another checkpoint: RUN@STEP"
    try:
        metadata = strict_pickle.load(file.read_bytes())
        _check_types(metadata)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{file} wants to load {error}, which no checkpoint needs", remedy=remedy) from None
    except Exception as error:  # a damaged pickle raises anything
        raise CheckpointError(f"{file} cannot be read: {type(error).__name__}: {error}", remedy=remedy) from None
    for name in {info.relative_path for info in metadata.storage_data.values()}:
        _check_inside(folder, name, remedy=remedy)
    _check_sizes(file, metadata, remedy=remedy)
    return metadata


def _check_types(metadata: Any) -> None:
    """Refuse an index whose parts are not what megatron-core and torch take them for.

    Raises:
        TypeError, AttributeError: something is of another type, or missing.
    """
    if type(metadata) is not Metadata or not isinstance(metadata.storage_data, dict):
        raise TypeError("it holds no index of tensors")
    for name, entry in metadata.state_dict_metadata.items():
        if type(name) is not str or not (type(entry) is BytesStorageMetadata or _is_tensor(entry)):
            raise TypeError("an entry is no tensor")
    for key, info in metadata.storage_data.items():
        numbers = (info.offset, info.length)
        if type(key) is not MetadataIndex or type(info) is not _StorageInfo or type(info.relative_path) is not str:
            raise TypeError("a place of a tensor is none")
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise TypeError("a place of a tensor has no offset and length")


def _is_tensor(entry: Any) -> bool:
    if type(entry) is not TensorStorageMetadata or type(entry.chunks) is not list or not _is_shape(entry.size):
        return False
    if type(entry.properties) is not TensorProperties or type(entry.properties.dtype) is not torch.dtype:
        return False
    return all(
        type(chunk) is ChunkStorageMetadata and _is_shape(chunk.offsets) and _is_shape(chunk.sizes)
        for chunk in entry.chunks
    )


def _check_sizes(file: Path, metadata: Metadata, *, remedy: str) -> None:
    """Refuse shapes that the stored bytes cannot fill: memory is taken by the shape.

    Raises:
        CheckpointError: a tensor, or a chunk of one, is larger than what is stored of it.
    """
    stored = {(key.fqn, key.offset): info.length for key, info in metadata.storage_data.items()}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        filled = 0
        for chunk in entry.chunks:
            length = stored.get((name, chunk.offsets), stored.get((name, None), 0))
            volume = math.prod(chunk.sizes)
            if volume * entry.properties.dtype.itemsize <= length:
                filled += volume
        if math.prod(entry.size) > filled:
            shape = "x".join(map(str, entry.size))
            raise CheckpointError(f"{file} says that {name} is {shape}, more than is stored of it", remedy=remedy)


def _is_shape(shape: Any) -> bool:
    return type(shape) is torch.Size and all(size >= 0 for size in shape)


def _check_inside(folder: Path, name: str, *, remedy: str) -> None:
    path = PurePosixPath(name)
    escapes = not name or path.is_absolute() or ".." in path.parts or "\\" in name
    if escapes or any((folder / part).is_symlink() for part in (path, *path.parents)):
        raise CheckpointError(f"{folder / METADATA} names the file {name!r}, outside of the checkpoint", remedy=remedy)


@contextlib.contextmanager
def vetted(folder: Path, metadata: Metadata) -> Iterator[None]:
    """Inside, megatron-core and torch take this index of a checkpoint instead of unpickling the file themselves.

    torch.load makes tensors and plain data only, as inside `weights_only`.

    Args:
        folder: the checkpoint.
        metadata: what `read_metadata` found in it.
    """
    before = FileSystemReader.read_metadata

    def read(reader: FileSystemReader, *_: Any, **__: Any) -> Metadata:
        found = copy.copy(metadata if Path(reader.path) == folder else read_metadata(Path(reader.path)))
        found.storage_meta = copy.copy(found.storage_meta) if found.storage_meta is not None else StorageMeta()
        found.storage_meta.load_id = reader.load_id
        return found

    FileSystemReader.read_metadata = read  # type: ignore[method-assign,assignment]
    try:
        with weights_only():
            yield
    finally:
        FileSystemReader.read_metadata = before  # type: ignore[method-assign]


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
