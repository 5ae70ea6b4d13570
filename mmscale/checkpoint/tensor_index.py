"""The index of a checkpoint: names, shapes and types of its tensors, and the file and place of each of their pieces.

A checkpoint has it twice. mmscale reads `index.json`: plain JSON, so that reading it cannot run code. `.metadata` is
torch's pickle of the same content, for other tools; checkpoints of older versions have only this one, and pickles.py
reads it then. In both cases the result is checked here before memory is allocated or files are opened because of it.

    {"format": 1,
     "files": ["__0_0.distcp"],
     "tensors": {NAME: {"dtype": "float32", "shape": [4, 8], "pieces": [[FILE, OFFSET, LENGTH, [0, 0], [4, 8]]]}},
     "objects": {NAME: [FILE, OFFSET, LENGTH]}}

FILE is an index into `files`; OFFSET and LENGTH are bytes of that file; the two lists of a piece are its first element
and its size in every dimension of the tensor.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import os
import pickle
import stat
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from mmscale import bounded
from mmscale.checkpoint.pickles import METADATA, MOST_BYTES, MOST_DIMENSIONS, load_metadata
from mmscale.checkpoint.torch_files import weights_only
from mmscale.errors import CheckpointError

INDEX = "index.json"
FORMAT = 1
_REMEDY = "do not use it, and find out where it comes from; choose another checkpoint: RUN@STEP"

_Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 62)]
_Shape = Annotated[list[_Count], Field(max_length=MOST_DIMENSIONS)]
_Place = tuple[_Count, _Count, _Count]  # file, offset, length
_Piece = tuple[_Count, _Count, _Count, _Shape, _Shape]


@dataclass(frozen=True)
class _Tensor:
    dtype: str
    shape: _Shape
    pieces: list[_Piece]


@dataclass(frozen=True)
class _Content:
    format: Literal[1]
    files: list[str]
    tensors: dict[str, _Tensor]
    objects: dict[str, _Place]


def name_in(files: Container[str]) -> str:
    """Which of a checkpoint's files its index is read from."""
    return INDEX if INDEX in files else METADATA


def read(folder: Path) -> Metadata:
    """The index of a checkpoint's tensors, checked.

    Args:
        folder: the checkpoint. integrity.py checks whether its files are intact.

    Raises:
        CheckpointError: there is no index, it cannot be read, it contradicts itself or the files next to it, or it
            refers to files outside of the folder.
    """
    file = folder / INDEX
    try:
        metadata = _from_json(bounded.read_object(file, most=MOST_BYTES))
    except FileNotFoundError:
        file = folder / METADATA
        metadata = load_metadata(folder)
    except (OSError, *bounded.BAD_CONTENT) as error:
        what = str(error).strip().splitlines() or [""]
        raise CheckpointError(f"{file} cannot be read: {type(error).__name__}: {what[0]}", remedy=_REMEDY) from None
    _check(file, metadata)
    return metadata


def files(metadata: Metadata, places: Iterable[WriteResult]) -> dict[str, Callable[[Any], object]]:
    """The two files of an index by name, each as a function that writes to a stream.

    Args:
        metadata: the tensors.
        places: where every piece of every tensor and every object was written.
    """
    index = dataclasses.replace(
        metadata,
        storage_data={place.index: place.storage_data for place in places},
        storage_meta=StorageMeta(),
        version=CURRENT_DCP_VERSION,
    )
    return {INDEX: lambda stream: stream.write(_to_json(index)), METADATA: lambda stream: pickle.dump(index, stream)}


def _to_json(metadata: Metadata) -> bytes:
    places = {(index.fqn, index.offset): info for index, info in (metadata.storage_data or {}).items()}
    numbers: dict[str, int] = {}

    def place(name: str, offset: torch.Size | None) -> tuple[int, int, int]:
        info = places[name, offset]
        return numbers.setdefault(info.relative_path, len(numbers)), info.offset, info.length

    tensors, objects = {}, {}
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            pieces = [(*place(name, chunk.offsets), chunk.offsets, chunk.sizes) for chunk in entry.chunks]
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            tensors[name] = {"dtype": dtype, "shape": entry.size, "pieces": pieces}
        else:
            objects[name] = place(name, None)
    whole = {"format": FORMAT, "files": list(numbers), "tensors": tensors, "objects": objects}
    return json.dumps(whole, separators=(",", ":")).encode()


def _from_json(found: dict[str, Any]) -> Metadata:
    said = bounded.record(_Content, found)
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for name, tensor in said.tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(at), torch.Size(size)) for _, _, _, at, size in tensor.pieces]
        properties = TensorProperties(dtype=_dtype(tensor.dtype))
        entries[name] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
        for number, ((file, offset, length, _, _), chunk) in enumerate(zip(tensor.pieces, chunks, strict=True)):
            index = MetadataIndex(name, chunk.offsets, number)
            places[index] = _StorageInfo(said.files[file], offset, length)
    for name, (file, offset, length) in said.objects.items():
        entries[name] = BytesStorageMetadata()
        places[MetadataIndex(name)] = _StorageInfo(said.files[file], offset, length)
    return Metadata(
        entries, planner_data=None, storage_data=places, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION
    )


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"no type of numbers is called {name[:40]!r}")
    return found


def _check(file: Path, metadata: Metadata) -> None:
    """Refuse an index that contradicts itself or the files of the checkpoint.

    Raises:
        CheckpointError: a file is outside of the checkpoint, a piece lies beyond the end of its file or outside of its
            tensor, pieces take more bytes than their file has, or a tensor is larger than its stored bytes.
    """
    stored: dict[str, int] = defaultdict(int)
    ends: dict[str, int] = defaultdict(int)
    for info in metadata.storage_data.values():
        stored[info.relative_path] += info.length
        ends[info.relative_path] = max(ends[info.relative_path], info.offset + info.length)
    around = {part for name in stored for part in PurePosixPath(name).parents}
    linked = {part for part in around if ".." not in part.parts and (file.parent / part).is_symlink()}
    for name, length in stored.items():
        path = PurePosixPath(name)
        escapes = not name or path.is_absolute() or ".." in path.parts or not _is_a_name(name)
        status = None if escapes else _status(file.parent / path)
        if escapes or not linked.isdisjoint(path.parents) or (status and stat.S_ISLNK(status.st_mode)):
            raise CheckpointError(f"{file} names the file {name!r}, outside of the checkpoint", remedy=_REMEDY)
        if status and length > status.st_size:
            problem = f"says that {name} holds {length:,} bytes of tensors, which has {status.st_size:,} bytes"
            raise CheckpointError(f"{file} {problem}", remedy=_REMEDY)
        if status and ends[name] > status.st_size:
            raise CheckpointError(f"{file} names bytes behind the end of {name}", remedy=_REMEDY)
    _check_shapes(file, metadata)


def _is_a_name(name: str) -> bool:
    """Whether this can be the name of a file."""
    with contextlib.suppress(UnicodeEncodeError):  # half of a surrogate pair, which JSON and pickles can contain
        return not {b"\\"[0], 0} & set(name.encode())
    return False


def _status(path: Path) -> os.stat_result | None:
    """Size and kind of a file; None: it does not exist or cannot be read, which integrity.py reports."""
    try:
        return path.lstat()
    except OSError:
        return None


def _check_shapes(file: Path, metadata: Metadata) -> None:
    """Refuse shapes that are larger than the stored bytes, because memory is allocated by the shape."""
    stored = {(key.fqn, key.offset): info.length for key, info in metadata.storage_data.items()}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        filled = 0
        for chunk in {chunk.offsets: chunk for chunk in entry.chunks}.values():  # pieces with the same place count once
            length = stored.get((name, chunk.offsets), stored.get((name, None), 0))
            volume = math.prod(chunk.sizes)
            if volume * entry.properties.dtype.itemsize <= length:
                filled += volume
        if math.prod(entry.size) > filled:
            shape = "x".join(map(str, entry.size))
            raise CheckpointError(f"{file} says that {name} is {shape}, more than is stored of it", remedy=_REMEDY)
        if not all(_is_inside(chunk, entry.size) for chunk in entry.chunks):
            raise CheckpointError(f"{file} has a piece of {name} that is outside of it", remedy=_REMEDY)


def _is_inside(chunk: ChunkStorageMetadata, size: torch.Size) -> bool:
    if not len(chunk.offsets) == len(chunk.sizes) == len(size):
        return False
    ends = (begin + length for begin, length in zip(chunk.offsets, chunk.sizes, strict=True))
    return all(end <= most for end, most in zip(ends, size, strict=True))


@contextlib.contextmanager
def vetted(folder: Path, metadata: Metadata) -> Iterator[None]:
    """Inside, megatron-core and torch use this index of a checkpoint instead of unpickling `.metadata` themselves.

    torch.load creates only tensors and plain data, as inside `weights_only`.

    Args:
        folder: the checkpoint.
        metadata: result of `read` for it.
    """
    before = FileSystemReader.read_metadata

    def checked(reader: FileSystemReader, *_: Any, **__: Any) -> Metadata:
        found = copy.copy(metadata if Path(reader.path) == folder else read(Path(reader.path)))
        found.storage_meta = copy.copy(found.storage_meta) if found.storage_meta is not None else StorageMeta()
        found.storage_meta.load_id = reader.load_id
        return found

    FileSystemReader.read_metadata = checked  # type: ignore[method-assign,assignment]
    try:
        with weights_only():
            yield
    finally:
        FileSystemReader.read_metadata = before  # type: ignore[method-assign]
