"""What is written for a tensor holds its values alone, as a copy of it would, and contiguous values are not copied."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from mmscale.checkpoint.shard_files import _with_own_storage, write_items

BUFFER = 96
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda buffer: buffer,
    "part": lambda buffer: buffer[8:32].view(4, 6),
    "end": lambda buffer: buffer[-1:],
    "scalar": lambda buffer: buffer[5],
    "columns": lambda buffer: buffer.view(8, 12)[:, 2:5],
    "transposed": lambda buffer: buffer[:24].view(4, 6).t(),
    "empty": lambda buffer: buffer[7:7],
    "empty rows": lambda buffer: buffer[:0].view(0, 6),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool)


def buffer_of(dtype: torch.dtype) -> Tensor:
    return (torch.arange(BUFFER) % 50).to(dtype)


def written(data: Tensor) -> bytes:
    stream = io.BytesIO()
    item = WriteItem(MetadataIndex("x"), WriteItemType.TENSOR)
    (place,) = write_items([(item, data)], "file", stream)  # type: ignore[arg-type]
    assert place.size_in_bytes == stream.tell()
    return stream.getvalue()


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_view_is_written_as_its_copy_is(view: str, dtype: torch.dtype) -> None:
    data = VIEWS[view](buffer_of(dtype))
    found = written(data)
    assert found == written(data.clone())
    loaded = torch.load(io.BytesIO(found), weights_only=True)
    assert loaded.dtype is dtype
    assert loaded.shape == data.shape
    assert torch.equal(loaded.reshape(-1).view(torch.uint8), data.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("view", ["whole", "part", "end"])
def test_contiguous_values_are_not_copied(view: str) -> None:
    data = VIEWS[view](buffer_of(torch.bfloat16))
    assert _with_own_storage(data).data_ptr() == data.data_ptr()


def test_a_parameter_is_written_without_its_gradient_flag() -> None:
    weight = torch.nn.Parameter(torch.ones(8))
    part = weight.detach()[2:6].requires_grad_()
    assert not torch.load(io.BytesIO(written(part)), weights_only=True).requires_grad
