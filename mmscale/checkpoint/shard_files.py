"""Writes the files of a checkpoint, each hashed while it is streamed and then synced to disk. No communication.

write.py writes the parts of ranks with it, rewrite.py whole checkpoints from other sources.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import xxhash
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from mmscale.checkpoint.integrity import FileRecord
from mmscale.checkpoint.tensors import BACKEND, COMMON
from mmscale.runtime.megatron_versions import CHECKPOINT_FORMAT

_BUFFER = 1 << 20
Content = Callable[[Any], object]  # writes to a stream
OnWrite = Callable[[str, int], None]


def tensors_file(number: int) -> str:
    """Name of a file of tensors.

    Args:
        number: of the rank that writes it, or of the file.
    """
    return f"__{number}_0.distcp"


def common_files(common: dict[str, Any]) -> dict[str, Content]:
    """The files that a checkpoint has once: everything that is not a tensor, and megatron-core's mark of the format."""
    return {
        COMMON: lambda stream: torch.save(common, stream),
        BACKEND: lambda stream: stream.write(json.dumps(CHECKPOINT_FORMAT).encode()),
    }


def write_files(
    folder: Path, contents: Mapping[str, Content], *, on_write: OnWrite = lambda name, size: None
) -> tuple[dict[str, FileRecord], float]:
    """Write new files.

    Args:
        folder: to write into; it and its parent are created.
        contents: writes each file, by relative name.
        on_write: called before every write with the name of the file and the number of bytes.

    Returns:
        Their records, and the seconds spent on digests.

    Raises:
        OSError: a file exists, or writing failed.
    """
    for path in (folder.parent, folder):
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
    files: dict[str, FileRecord] = {}
    hash_s = 0.0
    for name, content in contents.items():
        with _hashed(folder, name, on_write=on_write) as stream:
            content(stream)
        raw = cast(_HashedFile, stream.raw)
        files[name] = raw.record()
        hash_s += raw.hash_s
    return files, hash_s


def write_items(
    items: Iterable[tuple[WriteItem, Any]], name: str, stream: io.BufferedWriter[Any]
) -> Iterator[WriteResult]:
    """Write tensors as torch.save does, one after the other, as torch's and megatron's readers expect.

    Args:
        items: each with its tensor, or with a BytesIO.
        name: of the file, for the places.
        stream: the file.

    Yields:
        The place of each.
    """
    for item, data in items:
        begin = stream.tell()
        if item.type == WriteItemType.BYTE_IO:
            stream.write(data.getbuffer())
        else:
            torch.save(_with_own_storage(data), stream)
        length = stream.tell() - begin
        yield WriteResult(item.index, length, _StorageInfo(name, begin, length))


def _with_own_storage(data: torch.Tensor) -> torch.Tensor:
    """The same values with a storage that holds nothing else, without a copy where they are contiguous.

    torch.save writes the whole storage of a view, and parameters are views of one large buffer.
    """
    if data.untyped_storage().nbytes() == data.numel() * data.itemsize:
        return data
    if data.dim() == 0 or data.numel() == 0 or not data.is_contiguous():
        return data.clone()
    values = data.detach().view(-1).view(torch.uint8).numpy()  # torch takes an array's memory as a storage
    return torch.from_numpy(values).view(data.dtype).view(data.shape)


class _HashedFile(io.RawIOBase):
    """A new file that is hashed while it is written; see `_hashed`.

    Attributes:
        hash_s: seconds spent on the digest.
    """

    def __init__(self, path: Path, *, on_write: OnWrite) -> None:
        super().__init__()
        self.hash_s = 0.0
        self._on_write = on_write
        self._name = path.name
        self._state, self._size = xxhash.xxh3_128(), 0
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)

    def writable(self) -> bool:
        """Always true."""
        return True

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def write(self, data: Any) -> int:
        """Write all of it."""
        view = memoryview(data).cast("B")
        self._on_write(self._name, view.nbytes)
        begin = time.perf_counter()
        self._state.update(view)
        self.hash_s += time.perf_counter() - begin
        rest = view
        while rest:
            rest = rest[os.write(self._file, rest) :]
        self._size += view.nbytes
        return view.nbytes

    def sync(self) -> None:
        """Sync it to disk."""
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            os.close(self._file)
        super().close()

    def record(self) -> FileRecord:
        """Size and digest of what was written."""
        return FileRecord(self._size, self._state.hexdigest())


@contextlib.contextmanager
def _hashed(folder: Path, name: str, *, on_write: OnWrite) -> Iterator[io.BufferedWriter[Any]]:
    """A new file of a folder, which is on disk at the end.

    Small writes are buffered: torch.save makes ten of them a tensor.

    Its `raw` is the _HashedFile, which has the record.

    Raises:
        OSError: the file exists, or writing failed.
    """
    path = folder / name
    path.parent.mkdir(mode=0o755, exist_ok=True)
    raw = _HashedFile(path, on_write=on_write)
    try:
        stream = io.BufferedWriter(raw, _BUFFER)
        yield stream
        stream.flush()
        raw.sync()
    finally:
        raw.close()
