"""Moments in a checkpoint whose parameters lie otherwise in memory: Transformer-Engine's (out, in) as (in, out)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from mmscale.checkpoint.tensors import TensorEntry
from mmscale.train.optim.adam_compact import CompactAdam, ShardPlace, read, write
from mmscale.train.optim.boxes import FlatBox, boxes_of
from mmscale.train.optim.stored_moments import MomentReader, cell_of, cells_in, moment_boxes

IN, OUT, CUT = 96, 160, 64 * 37  # rows of neither order are multiples of 128; the cut is inside a group
PREFIX = "optimizer.state"


def _as_it_is(key: str, tensor: Tensor) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(key, tensor, replica_id=(0, 0, 0))


def _transposed(key: str, tensor: Tensor, *_: Any) -> list[ShardedTensor]:
    return [_as_it_is(key, tensor.t())]


def _merged(found: Any) -> Tensor:
    merged: Tensor = found[0].t()
    return merged


class Rank:
    """A part of a parameter with its optimizer."""

    def __init__(self, parameter: Tensor, *, permuted: bool, start: int, end: int, fp8: bool = True) -> None:
        whole = ShardedTensorFactory("w", parameter, _transposed, _merged) if permuted else _as_it_is("w", parameter)
        self.pieces: list[FlatBox] = list(boxes_of(whole, parameter, start, end))
        self.main = parameter.view(-1)[start:end].clone()
        self.place = ShardPlace.at(start, "fp8_coat" if fp8 else None)
        self.cell = cell_of(parameter.shape, shard=64)
        self.adam = CompactAdam([torch.nn.Parameter(self.main)], moments="fp8_coat")
        (self.param,) = self.adam.param_groups[0]["params"]
        self.adam.places[self.param] = self.place
        self.adam.initialize()

    @property
    def state(self) -> Mapping[str, Tensor]:
        return self.adam.state[self.param]

    def values(self, moment: str) -> Tensor:
        return read(self.state, moment, self.place, 0, self.main.numel())


def filled(boxes: list[ShardedTensor], into: dict[str, Tensor]) -> None:
    for box in boxes:
        assert box.data is not None
        whole = into.setdefault(box.key, torch.zeros(box.global_shape, dtype=box.data.dtype))
        region = tuple(slice(at, at + size) for at, size in zip(box.global_offset, box.local_shape, strict=True))
        whole[region] = box.data


def saved(*, permuted: bool) -> tuple[dict[str, Tensor], Tensor]:
    """What two ranks write, and the second moments as (in, out)."""
    shape = (OUT, IN) if permuted else (IN, OUT)
    drawn = torch.Generator().manual_seed(7)
    parameter = torch.nn.Parameter(torch.randn(shape, generator=drawn))
    found: dict[str, Tensor] = {}
    parts = []
    for start, end in ((0, CUT), (CUT, IN * OUT)):
        rank = Rank(parameter, permuted=permuted, start=start, end=end)
        for moment in ("exp_avg", "exp_avg_sq"):
            values = torch.randn(end - start, generator=drawn)
            write(rank.state, moment, rank.place, 0, values.square() if moment == "exp_avg_sq" else values)
            filled(moment_boxes(PREFIX, moment, rank.pieces, rank.state, rank.place, cell=rank.cell), found)
        filled([piece.shard(f"{PREFIX}.param", rank.main) for piece in rank.pieces], found)
        parts.append(rank.values("exp_avg_sq"))
    squares = torch.cat(parts).view(shape)
    return found, squares.t() if permuted else squares


def loaded(found: Mapping[str, Tensor], *, permuted: bool, fp8: bool = True) -> tuple[Tensor, Tensor]:
    """Second moments and master weights as (in, out), read by one rank."""
    parameter = torch.nn.Parameter(torch.zeros((OUT, IN) if permuted else (IN, OUT)))
    rank = Rank(parameter, permuted=permuted, start=0, end=IN * OUT, fp8=fp8)
    stored = {name: TensorEntry(name, tuple(tensor.shape), tensor.dtype) for name, tensor in found.items()}
    reader = MomentReader(PREFIX, stored)
    contents = []
    for box in reader.ask(rank.pieces, rank.main, rank.state, rank.place, cell=rank.cell):
        region = tuple(slice(at, at + size) for at, size in zip(box.global_offset, box.local_shape, strict=True))
        assert tuple(box.global_shape) == tuple(found[box.key].shape) and box.dtype is found[box.key].dtype
        contents.append(found[box.key][region].clone())
    reader.take(contents)
    squares, main = rank.values("exp_avg_sq").view(parameter.shape), rank.main.view(parameter.shape)
    return (squares.t(), main.t()) if permuted else (squares, main)


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_any_order_reads_any_order(written: bool, wanted: bool) -> None:
    found, squares = saved(permuted=written)
    assert found[f"{PREFIX}.exp_avg_sq.w"].dtype is torch.uint8 and found[f"{PREFIX}.exp_avg_sq.w"].shape == (IN, OUT)
    scales = found[f"{PREFIX}.exp_avg_sq_scale.w"]
    assert cells_in((IN, OUT), scales.shape) == ((32, 0) if written else (32, 1))
    exact, main = loaded(found, permuted=wanted, fp8=False)
    assert torch.equal(exact, squares)
    assert torch.equal(main, found[f"{PREFIX}.param.w"])
    again, _ = loaded(found, permuted=wanted)
    changed = int((again != squares).sum())
    if written == wanted:
        assert 0 < changed <= 128  # the group that the cut went through
    else:
        assert changed > 128
    apart = (again - squares).abs() / squares
    assert float(apart[squares > 0.01 * squares.max()].max()) < 0.13
