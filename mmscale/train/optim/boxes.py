"""Converts a flat range of a parameter into boxes of its global tensor, for the optimizer's sharded state.

megatron-core gives each data-parallel rank a flat range of a parameter in memory order, but checkpoints describe boxes
of global tensors. Example: elements [5, 14) of a [4, 4] tensor (rows of 4) are three boxes: row 1 from column 1 to 3 (3
elements), row 2 whole (4), row 3 columns 0 and 1 (2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

Box = tuple[tuple[int, ...], tuple[int, ...]]  # (offsets, sizes) of a box, one number for each dimension


@dataclass(frozen=True)
class FlatBox:
    """A box of a tensor, and the place of its elements in a rank's flat range.

    Attributes:
        whole: this rank's part of the global tensor, as the model describes it.
        offsets, sizes: of the box within that part.
        at: position of the box's first element in the flat range.
        order: the part's dimensions in memory order, outermost first; None: the tensor's own order. A stacked expert
            weight has (in, out), but Transformer-Engine's grouped linear stores (out, in).
    """

    whole: ShardedTensor
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    at: int
    order: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        """Number of elements of the box."""
        return math.prod(self.sizes)

    @property
    def axis(self) -> int:
        """The dimension along which elements are contiguous in memory."""
        return len(self.sizes) - 1 if self.order is None else self.order[-1]

    def columns(self, axis: int) -> tuple[int, int]:
        """The box's half-open range in a dimension of the global tensor."""
        begin = self.whole.global_offset[self.whole.prepend_axis_num + axis] + self.offsets[axis]
        return begin, begin + self.sizes[axis]

    def shard(self, prefix: str, flat: Tensor) -> ShardedTensor:
        """The box's elements of a flat range as a ShardedTensor with key `<prefix>.<key of the tensor>`."""
        whole = self.whole
        before = whole.global_offset[: whole.prepend_axis_num]
        inside = zip(whole.global_offset[whole.prepend_axis_num :], self.offsets, strict=True)
        data = self.from_memory(flat[self.at : self.at + self.numel], self.sizes)
        return box_of(
            whole,
            f"{prefix}.{whole.key}",
            data,
            offset=(*before, *(begin + offset for begin, offset in inside)),
            sizes=self.sizes,
            shape=whole.global_shape,
        )

    def cells(self, prefix: str, data: Tensor, *, cell: int, width: int, axis: int) -> ShardedTensor:
        """The corresponding box of a tensor that has `width` numbers for every `cell` elements of one dimension.

        Used for the scales of FP8 moments: neighbouring elements (a cell) share `width` numbers.

        Args:
            prefix: of the key.
            data: the numbers of all cells that overlap the box, of shape `cell_sizes(...)`.
            cell: elements of a cell; the global dimension is a multiple of it.
            width: numbers of a cell.
            axis: the dimension.
        """
        whole, number = self.whole, self.whole.prepend_axis_num + axis
        offset = [*whole.global_offset[: whole.prepend_axis_num]]
        offset += [self.columns(dimension)[0] for dimension in range(len(self.sizes))]
        offset[number] = offset[number] // cell * width
        shape = [*whole.global_shape]
        shape[number] = shape[number] // cell * width
        sizes = self.cell_sizes(cell=cell, width=width, axis=axis)
        return box_of(whole, f"{prefix}.{whole.key}", data, offset=offset, sizes=sizes, shape=shape)

    def cell_sizes(self, *, cell: int, width: int, axis: int) -> tuple[int, ...]:
        """Shape of the box that `cells` describes: all cells that overlap this box."""
        begin, end = self.columns(axis)
        return (*self.sizes[:axis], (-(-end // cell) - begin // cell) * width, *self.sizes[axis + 1 :])

    def from_memory(self, flat: Tensor, sizes: Sequence[int]) -> Tensor:
        """Reshape elements in memory order to a box of these sizes."""
        if self.order is None:
            return flat.view(tuple(sizes))
        places = [self.order.index(axis) for axis in range(len(self.order))]
        return flat.view([sizes[axis] for axis in self.order]).permute(places)

    def to_memory(self, box: Tensor) -> Tensor:
        """The inverse of `from_memory`, for a box of this one's sizes."""
        data = box.reshape(self.sizes)
        return (data if self.order is None else data.permute(self.order)).reshape(-1)


def box_of(
    whole: ShardedTensor, key: str, data: Tensor, *, offset: Sequence[int], sizes: Sequence[int], shape: Sequence[int]
) -> ShardedTensor:
    """A ShardedTensor for a box at any offset.

    Not on a regular grid, because ranks own different numbers of elements.
    """
    prepended = whole.prepend_axis_num
    assert len(whole.replica_id) == 3, whole  # (pipeline, tensor, data-parallel), by megatron-core's convention
    local = (1,) * prepended + tuple(sizes)
    return ShardedTensor(
        key=key,
        data=data.view(local),
        dtype=data.dtype,
        local_shape=local,
        global_shape=tuple(shape),
        global_offset=tuple(offset),
        axis_fragmentations=None,
        # 0: this rank writes the box, because no other data-parallel rank has these elements.
        replica_id=(*whole.replica_id[:2], 0),
        allow_shape_mismatch=whole.allow_shape_mismatch,
    )


def boxes_of(place: ShardedTensor | ShardedTensorFactory, parameter: Tensor, start: int, end: int) -> Iterator[FlatBox]:
    """Cut elements [start, end) of a parameter into boxes of its global tensor (or tensors: SwiGLU's two halves).

    Args:
        place: describes the parameter on this rank.
        parameter: the parameter of the model.
        start: first element of this data-parallel rank's part, in memory order.
        end: one past the last element.
    """
    for whole in _tensors(place, parameter):
        assert whole.data is not None
        order = order_of(whole.data)
        # `memory` has its dimensions in memory order, so that [start, end) is a row-major range of it. `boxes` cuts
        # that range; below, offsets and sizes are permuted back to the tensor's own dimensions.
        memory = whole.data if order is None else whole.data.permute(order)
        assert memory.is_contiguous(), whole.key
        # First element of this tensor in the parameter.
        first = whole.data.storage_offset() - parameter.storage_offset()
        low, high = max(start, first), min(end, first + whole.data.numel())
        if low >= high:
            continue
        at = low - start
        for offsets, sizes in boxes(memory.shape, low - first, high - first):
            if order is None:
                yield FlatBox(whole, offsets, sizes, at)
            else:
                places = [order.index(axis) for axis in range(len(order))]
                yield FlatBox(whole, tuple(offsets[i] for i in places), tuple(sizes[i] for i in places), at, order)
            at += math.prod(sizes)


def order_of(data: Tensor) -> tuple[int, ...] | None:
    """The dimensions of a permuted tensor in memory order, outermost first; None: it is contiguous."""
    if data.is_contiguous():
        return None
    strides = data.stride()
    return tuple(sorted(range(data.dim()), key=lambda axis: strides[axis], reverse=True))


def _tensors(place: ShardedTensor | ShardedTensorFactory, parameter: Tensor) -> list[ShardedTensor]:
    if isinstance(place, ShardedTensorFactory):
        return list(nested_values(replace(place, data=parameter.detach()).build()))
    return [replace(place, data=parameter.detach())]


def boxes(shape: Sequence[int], start: int, end: int) -> Iterator[Box]:
    """Cut the flat range [start, end) of a row-major tensor into boxes, in the order of their elements.

    Recursive: the end of the row that the range starts in, then whole rows, then the beginning of the row that it ends
    in; the two partial rows are cut in the same way along their own dimensions. At most 2 * dimensions - 1 boxes.
    """
    if start >= end:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    # Rows first ... last - 1 lie completely inside the range.
    first, last = -(-start // row), end // row
    if first > last:  # the range starts and ends inside one row
        yield from _in_row(shape, last, start - last * row, end - last * row)
        return
    if start < first * row:
        yield from _in_row(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    if end > last * row:
        yield from _in_row(shape, last, 0, end - last * row)


def _in_row(shape: Sequence[int], row: int, start: int, end: int) -> Iterator[Box]:
    for offsets, sizes in boxes(shape[1:], start, end):
        yield (row, *offsets), (1, *sizes)
