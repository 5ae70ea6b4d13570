"""Reads torch's `.metadata`, a raw pickle, with strict_pickle.py, so that no code from it runs.

It is used only if there is no `index.json` (tensor_index.py, which checks the content).
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from mmscale import bounded
from mmscale.checkpoint import strict_pickle
from mmscale.errors import CheckpointError

METADATA = ".metadata"
MOST_BYTES = 2 << 30  # largest index: ten million pieces
MOST_DIMENSIONS = 64


def load_metadata(folder: Path) -> Metadata:
    """The object in `.metadata`, with checked types; tensor_index.py checks its content.

    Raises:
        CheckpointError: it cannot be read, or refers to something that is not part of an index.
    """
    file = folder / METADATA
    remedy = "do not use it, and find out where it comes from; choose another checkpoint: RUN@STEP"
    try:
        metadata = strict_pickle.load(bounded.read_bytes(file, most=MOST_BYTES))
        _check_types(metadata)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{file} wants to load {error}, which no checkpoint needs", remedy=remedy) from None
    except Exception as error:  # a damaged pickle raises anything
        raise CheckpointError(f"{file} cannot be read: {type(error).__name__}: {error}", remedy=remedy) from None
    return metadata  # type: ignore[no-any-return]


def _check_types(metadata: Any) -> None:
    """Refuse an index whose parts do not have the types that megatron-core and torch expect.

    Raises:
        TypeError, AttributeError: a part has another type, or is missing.
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
        if info.transform_descriptors:  # a few bytes may describe any number of transforms
            raise TypeError("a place of a tensor is compressed")


def _is_tensor(entry: Any) -> bool:
    if type(entry) is not TensorStorageMetadata or type(entry.chunks) is not list or not _is_shape(entry.size):
        return False
    if type(entry.properties) is not TensorProperties or type(entry.properties.dtype) is not torch.dtype:
        return False
    return all(
        type(chunk) is ChunkStorageMetadata and _is_shape(chunk.offsets) and _is_shape(chunk.sizes)
        for chunk in entry.chunks
    )


def _is_shape(shape: Any) -> bool:
    return type(shape) is torch.Size and len(shape) <= MOST_DIMENSIONS and all(size >= 0 for size in shape)
