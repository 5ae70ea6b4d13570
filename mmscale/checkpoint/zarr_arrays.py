"""One tensor as a zarr v3 array in a folder, through tensorstore: shards of chunks, each chunk with its crc32c.

Reading a box touches only the chunks that contain a part of it. Only one process may write an array: two that write
into one shard lose updates (24 of 32 rows survived when measured). archive.py defines folders and names.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
import torch
from torch import Tensor

from mmscale import bounded

Box = tuple[slice, ...]
META = "zarr.json"
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_CODECS = [_BYTES, {"name": "crc32c"}]
_WORTH_A_CHUNK = 4096  # bytes: above this size each slice of the first dimension has separate chunks
# Types with the same bits in torch and numpy, which has no bfloat16; torch has none of numpy's extensions.
_BITS = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.int16), 4: (torch.int32, np.int32), 8: (torch.int64, np.int64)}
DTYPES = frozenset(
    {"bool", "uint8", "int8", "int16", "int32", "int64", "bfloat16", "float16", "float32", "float64"}
    | {"float8_e4m3fn", "float8_e5m2"}
)
# Types that zarr v3 does not specify are stored as integers with the same bits, and with the type as an attribute.
_AS_BITS = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}
_ATTRIBUTE = "dtype"
_MOST_SHARDS = 1_000_000  # largest number of shards of an array; one of 100 GB has 400


@dataclass(frozen=True)
class Grid:
    """Sizes of chunks and shards.

    Attributes:
        chunk_bytes: largest unit of reading and checking.
        shard_bytes: largest size of a file; writing holds two or three times that in memory.
    """

    chunk_bytes: int = 1 << 20
    shard_bytes: int = 64 << 20

    def chunk(self, shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
        """Shape of a chunk. With three dimensions or more it stays inside one slice of the first: one expert."""
        slice_bytes = itemsize * math.prod(shape[1:])
        if len(shape) >= 3 and slice_bytes >= _WORTH_A_CHUNK:
            return (1, *cut(shape[1:], itemsize=itemsize, limit=self.chunk_bytes))
        return cut(shape, itemsize=itemsize, limit=self.chunk_bytes)

    def shard(self, shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
        """Shape of a shard: whole chunks."""
        largest = cut(shape, itemsize=itemsize, limit=self.shard_bytes)
        pairs = zip(shape, largest, self.chunk(shape, itemsize), strict=True)
        return tuple(
            math.ceil(max(1, size) / chunk) * chunk if most >= size else max(chunk, most // chunk * chunk)
            for size, most, chunk in pairs
        )


def cut(shape: Sequence[int], *, itemsize: int, limit: int) -> tuple[int, ...]:
    """The largest box of at most `limit` bytes that is contiguous in a row-major tensor; at least one element."""
    box = [max(1, size) for size in shape]
    for dimension in range(len(box)):
        row = itemsize * math.prod(box[dimension + 1 :])
        if row * box[dimension] <= limit:
            break
        box[dimension] = max(1, limit // row)
    return tuple(box)


def boxes(shape: Sequence[int], piece: Sequence[int]) -> Iterator[Box]:
    """The boxes of a regular grid that cover a shape; those at the end are smaller."""
    starts = [range(0, size, step) for size, step in zip(shape, piece, strict=True)]
    for corner in itertools.product(*starts):
        yield tuple(
            slice(start, min(start + step, size)) for start, step, size in zip(corner, piece, shape, strict=True)
        )


def write(folder: Path, tensor: Tensor, *, grid: Grid) -> None:
    """Write a tensor as an array, one shard after the other.

    Args:
        folder: of the array; replaced if it exists.
        tensor: on the host, of any shape.
        grid: sizes of shards and chunks.

    Raises:
        OSError: writing failed.
    """
    shape, itemsize = list(tensor.shape), tensor.dtype.itemsize
    dtype = str(tensor.dtype).removeprefix("torch.")
    shard = grid.shard(shape, itemsize)
    sharding = {"chunk_shape": list(grid.chunk(shape, itemsize)), "codecs": _CODECS, "index_codecs": _CODECS}
    metadata = {
        "shape": shape,
        "data_type": _AS_BITS.get(dtype, dtype),
        "attributes": {_ATTRIBUTE: dtype} if dtype in _AS_BITS else {},
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shard)}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    array = _open(folder, create=True, delete_existing=True, store_data_equal_to_fill_value=True, metadata=metadata)
    bits = to_numpy(tensor).view(array.dtype.numpy_dtype)
    for box in boxes(shape, shard):
        try:
            array[box].write(bits[box], can_reference_source_data_indefinitely=True).result()
        except ValueError as error:
            raise _as_os_error(error) from error


def read(folder: Path, box: Box | None = None) -> Tensor:
    """A tensor on the host, in the type it was written with.

    Args:
        folder: of the array.
        box: a slice of every dimension; None: the whole tensor.

    Raises:
        ValueError: a chunk or the array's description is damaged; the text names the file.
    """
    array = _open(folder, open=True)
    dtype = getattr(torch, dtype_of(array.spec().to_json()["metadata"]))
    if box is not None:
        return _to_torch(np.asarray(array[box].read(order="C").result()), dtype)
    # One shard after the other, because tensorstore reads faster than it decodes and would need memory for two copies.
    whole = np.empty(array.shape, dtype=array.dtype.numpy_dtype)
    for part in boxes(array.shape, array.chunk_layout.write_chunk.shape):
        whole[part] = array[part].read(order="C").result()
    return _to_torch(whole, dtype)


def _to_torch(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(array.view(_BITS[dtype.itemsize][1])).view(dtype)


def dtype_of(metadata: dict[str, Any]) -> str:
    """The name of an array's type in torch. Arrays written before 0.2 have `bfloat16` as their zarr type.

    Args:
        metadata: the parsed zarr.json.

    Raises:
        ValueError: it is not in `DTYPES`, or the attribute does not match the integers.
    """
    stored = str(metadata["data_type"])
    name = str(metadata.get("attributes", {}).get(_ATTRIBUTE, stored))
    if name not in DTYPES or (name != stored and _AS_BITS.get(name) != stored):
        raise ValueError(f"the type {name} in {stored} is not known")
    return name


def shard_files(metadata: dict[str, Any]) -> list[str]:
    """All files of an array except its description. None may be missing, because it would read as zeros.

    Args:
        metadata: the parsed zarr.json.

    Raises:
        ValueError: it does not describe an array, or describes more shards than any archive has.
    """
    try:
        grid = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        counts = [range(-(-size // step)) for size, step in zip(metadata["shape"], grid, strict=True)]
    except bounded.BAD_CONTENT as error:
        raise ValueError(f"it describes no array ({type(error).__name__})") from None
    if math.prod(map(len, counts)) > _MOST_SHARDS:
        raise ValueError(f"it describes more than {_MOST_SHARDS:,} shards")
    return ["/".join(["c", *map(str, corner)]) for corner in itertools.product(*counts)]


def to_numpy(tensor: Tensor) -> np.ndarray:
    """The bits of a tensor on the host as integers of its width (bf16: 16 bits), in the same shape, without a copy."""
    bits: np.ndarray = tensor.view(_BITS[tensor.dtype.itemsize][0]).numpy()
    return bits


def _open(folder: Path, **options: Any) -> Any:
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{folder.resolve()}/"},
        "context": {"file_io_sync": False},  # the commit flushes everything to disk together
        **options,
    }
    try:
        return ts.open(spec).result()
    except ValueError as error:
        raise (_as_os_error(error) if options.get("create") else error) from None


def _as_os_error(error: ValueError) -> OSError:
    """Tensorstore reports storage errors as text: "... No space left on device [os_error_code='28']"."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    number = int(found.group(1)) if found else errno.EIO
    return OSError(number, os.strerror(number))
