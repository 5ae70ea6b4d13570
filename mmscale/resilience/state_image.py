r"""A rank's state as one flat image: a header in JSON, then the bytes of every tensor. No pickle.

    0   "MMSNAP1\n"
    8   bytes of the header, then bytes of the whole image; both unsigned, 8 bytes, little-endian
    24  the header: {"tensors": [[name, dtype, shape, offset, bytes], ...], "plain": {...}}
    ... zeros up to the first tensor; tensors are aligned to 64 bytes; offsets count from the start of the image

train/state/local_state.py defines the tensors; snapshot_files.py defines the place of the image.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmscale import bounded
from mmscale.resilience.parity import ALIGN
from mmscale.resilience.snapshot_files import UnusableError
from mmscale.runtime import device

_MAGIC = b"MMSNAP1\n"
_FIXED = struct.Struct("<8sQQ")
_NUMBERS = 48  # bytes of the header for a tensor's offset and size
_SPARE = 1 << 16  # bytes of the header for plain values that grow, e.g. a list of skipped data
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.float16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.bool,
    )
}


@dataclass(frozen=True)
class ImagePlan:
    """The layout of an image.

    Attributes:
        shapes: name, dtype and shape of each tensor, in order.
        offsets: first byte of each tensor.
        table: the header's list of tensors, as JSON.
        space: bytes up to the first tensor.
        length: bytes of the image.
    """

    shapes: tuple[tuple[str, torch.dtype, torch.Size], ...]
    offsets: tuple[int, ...]
    table: str
    space: int
    length: int

    def fits(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> bool:
        """Whether a state still has the shapes of this plan."""
        return _shapes(tensors) == self.shapes and _FIXED.size + len(self._header(plain)) <= self.space

    def _header(self, plain: Mapping[str, Any]) -> bytes:
        return f'{{"tensors": {self.table}, "plain": {json.dumps(plain)}}}'.encode()

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Views of all tensors, in the order of `shapes`, in the bytes of an image (uint8 [bytes])."""
        return [
            _view(buffer, offset, dtype, shape)
            for (_, dtype, shape), offset in zip(self.shapes, self.offsets, strict=True)
        ]

    def write(
        self, buffer: Tensor, views: list[Tensor], tensors: Mapping[str, Tensor], plain: Mapping[str, Any]
    ) -> None:
        """Copy a state into an image, at the speed of memory.

        Args:
            buffer: [length] bytes on the host.
            views: `views(buffer)`; reused, because there may be thousands of them.
            tensors: as planned, on any device.
            plain: JSON.
        """
        header = self._header(plain)
        start = _FIXED.pack(_MAGIC, len(header), self.length) + header
        assert len(start) <= self.space
        buffer[: len(start)] = torch.frombuffer(bytearray(start), dtype=torch.uint8)
        buffer[len(start) : self.space] = 0
        if views:
            torch._foreach_copy_(views, list(tensors.values()), non_blocking=True)
        device.synchronize()


def make_plan(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> ImagePlan:
    """Lay out an image for these tensors, with room for plain values to grow."""
    shapes = _shapes(tensors)
    names = len(json.dumps([[name, str(dtype), list(shape)] for name, dtype, shape in shapes]))
    space = _round(_FIXED.size + names + _NUMBERS * len(shapes) + 2 * len(json.dumps(plain)) + _SPARE)
    offset, offsets, rows = space, [], []
    for name, dtype, shape in shapes:
        size = math.prod(shape) * dtype.itemsize
        offsets.append(offset)
        rows.append([name, str(dtype).removeprefix("torch."), list(shape), offset, size])
        offset += _round(size)
    return ImagePlan(shapes, tuple(offsets), json.dumps(rows), space, offset)


def read(buffer: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, as views of the image, and plain values.

    Raises:
        UnusableError: it is not an image. Digests are checked elsewhere; reading never runs code from the image.
    """
    try:
        magic, header, length = _FIXED.unpack(buffer[: _FIXED.size].numpy().tobytes())
        if magic != _MAGIC or length != buffer.numel() or header > length - _FIXED.size:
            raise UnusableError("no image of a snapshot")
        content = bounded.parse_json(buffer[_FIXED.size : _FIXED.size + header].numpy().tobytes())
        tensors = {}
        for name, dtype, shape, offset, size in content["tensors"]:
            if min([0, *shape]) < 0 or math.prod(shape) * _DTYPES[dtype].itemsize != size:
                raise UnusableError(f"{name}: shape and bytes do not fit together")
            if offset < 0 or offset % ALIGN or offset + size > length:
                raise UnusableError(f"{name} lies outside of the image")
            tensors[name] = _view(buffer, offset, _DTYPES[dtype], torch.Size(shape))
        return tensors, dict(content["plain"])
    except (struct.error, RuntimeError, *bounded.BAD_CONTENT) as error:  # RuntimeError: torch, of a shape
        raise UnusableError(f"an image with a header that is not readable ({type(error).__name__})") from None


def _shapes(tensors: Mapping[str, Tensor]) -> tuple[tuple[str, torch.dtype, torch.Size], ...]:
    return tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())


def _view(buffer: Tensor, offset: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return buffer[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def _round(size: int) -> int:
    return -(-size // ALIGN) * ALIGN
