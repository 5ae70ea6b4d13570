"""Adam's moments in checkpoints: written in their present format, converted to this run's format when read.

A moment in FP8 is two tensors: `exp_avg` with the parameter's shape (uint8, the bits of E4M3), and `exp_avg_scale`,
fp32, with the three numbers of adam_moments.py for every *cell* of the last dimension. Groups of 128 are counted along
the flat parts of ranks, so another layout has other groups. Cells have at most 64 elements, chosen so that no rank's
part starts inside one, and for every cell the numbers of its group are stored. For a parameter [R, C] with cells of 64
the scales have the shape [R, 3 C / 64]. So any layout can read any box, and:

- groups that consist of elements of one old group keep their bits: always on the same layout, and on any other if rows
  are multiples of 128, or if the tensor is not sharded in its last dimension and parts start with a group;
- other groups are decoded and quantised again, which adds at most one more E4M3 rounding error (adam_moments.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from mmscale.checkpoint.tensors import TensorEntry
from mmscale.train.optim.adam_compact import MOMENTS, ShardPlace, triples_of, write
from mmscale.train.optim.adam_moments import GROUP, TRIPLE, from_groups, pack, to_groups, unpack
from mmscale.train.optim.boxes import FlatBox

_CELL = 64  # megatron-core aligns the start of parameters to multiples of this


def cell_of(shape: Sequence[int], *, shard: int) -> int:
    """Number of elements of the last dimension that always share a scale.

    Args:
        shape: of this rank's part of the parameter.
        shard: elements of a bucket that a data-parallel rank owns.
    """
    return math.gcd(_CELL, shape[-1], shard) if shape else 1


def stores_others(prefix: str, stored: Mapping[str, TensorEntry]) -> bool:
    """Whether a checkpoint has moments that are not fp32, or first moments without second moments (Muon's)."""
    first, second = (f"{prefix}.{moment}" for moment in MOMENTS)
    return any(
        entry.dtype is not torch.float32 or (name.startswith(f"{first}.") and name.replace(first, second) not in stored)
        for name, entry in stored.items()
        if name.startswith((first, second))
    )


def moment_boxes(
    prefix: str, moment: str, pieces: Sequence[FlatBox], state: Mapping[str, Tensor], place: ShardPlace, *, cell: int
) -> list[ShardedTensor]:
    """The boxes to write for a rank's part of one moment.

    Args:
        prefix: of the keys.
        moment: one of `MOMENTS`.
        pieces: boxes of the part.
        state: the optimizer's state of the part.
        place: where the part begins in its parameter, and the format of its moments.
        cell: as for `cell_of`.
    """
    flat = state[moment].detach().view(-1)
    found = [piece.shard(f"{prefix}.{moment}", flat) for piece in pieces]
    if not place.in_groups:
        return found
    # First element of each cell, counted from the start of the part's first group: // GROUP is the number of its group,
    # whose triple is repeated for each of the group's cells.
    begins = torch.arange(place.lead, place.lead + flat.numel(), cell, device=flat.device)
    cells = state[triples_of(moment)][begins // GROUP]
    for piece in pieces:
        first, last = piece.at // cell, (piece.at + piece.numel) // cell
        sizes = piece.cell_sizes(cell=cell, width=TRIPLE, axis=piece.axis)
        numbers = piece.from_memory(cells[first:last].reshape(-1), sizes)
        name = f"{prefix}.{triples_of(moment)}"
        found.append(piece.cells(name, numbers, cell=cell, width=TRIPLE, axis=piece.axis))
    return found


@dataclass
class _Asked:
    """One moment of a rank's part that is being read.

    Attributes:
        state: where the values are stored; None: nowhere, because this run's optimizer does not keep the moment.
        moment, place: likewise.
        pieces: boxes of the part.
        values: numbers of its boxes in the list of all boxes that are read.
        cells: likewise the numbers of the scales' boxes; empty if the checkpoint has no scales.
        cell, axis: how many elements share a scale in the checkpoint, and along which dimension.
    """

    state: Mapping[str, Tensor] | None
    moment: str
    place: ShardPlace
    pieces: Sequence[FlatBox]
    values: range
    cells: range
    cell: int
    axis: int


class MomentReader:
    """Reads one optimizer's master weights and moments from a checkpoint whose moments have any format.

    The optimizer of the checkpoint may be another one. Muon takes its momentum from Adam's first moment, and discards
    the second moment. Adam needs a second moment, which Muon's matrices do not have: both moments of these matrices
    start from zero (`restarted`).

    Args:
        prefix: of the keys.
        stored: tensors of the checkpoint; None: assume the format in which this run would write them.
    """

    def __init__(self, prefix: str, stored: Mapping[str, TensorEntry] | None) -> None:
        self._prefix = prefix
        self._stored = stored
        self._number = 0
        self._mains: list[tuple[Tensor, Sequence[FlatBox], range]] = []
        self._asked: list[_Asked] = []
        self._restarted: list[tuple[Mapping[str, Tensor], ShardPlace, int]] = []

    @property
    def restarted(self) -> bool:
        """Whether moments will start from zero."""
        return bool(self._restarted)

    def ask(
        self, pieces: Sequence[FlatBox], main: Tensor, state: Mapping[str, Tensor], place: ShardPlace, *, cell: int
    ) -> list[ShardedTensor]:
        """The boxes to read for a rank's part of a parameter; `take` expects their contents in this order.

        Args:
            pieces: boxes of the part.
            main: the part's master weights.
            state: the part's moments.
            place: where the part begins in its parameter.
            cell: as for `cell_of`.
        """
        found = [piece.shard(f"{self._prefix}.param", main.new_empty(main.numel())) for piece in pieces]
        self._mains.append((main, pieces, self._numbers(len(found))))
        key = pieces[0].whole.key
        there = self._moments_of(key) or place.moments
        restarts = not set(place.moments) <= set(there)
        if restarts:
            self._restarted.append((state, place, main.numel()))
        for moment in there:  # all of them, because a checkpoint must be read completely
            name, scales = f"{self._prefix}.{moment}", f"{self._prefix}.{triples_of(moment)}"
            dtype, cells = self._kept(name, scales, pieces[0], place, cell)
            values = [piece.shard(name, main.new_empty(main.numel(), dtype=dtype)) for piece in pieces]
            boxes: list[ShardedTensor] = []
            size, axis = cells or (1, 0)
            if cells is not None:
                for piece in pieces:
                    numbers = main.new_empty(piece.cell_sizes(cell=size, width=TRIPLE, axis=axis))
                    boxes.append(piece.cells(scales, numbers, cell=size, width=TRIPLE, axis=axis))
            assert all(piece.whole.key == key for piece in pieces), pieces
            numbers_of = self._numbers(len(values)), self._numbers(len(boxes))
            kept = state if moment in place.moments and not restarts else None
            self._asked.append(_Asked(kept, moment, place, pieces, *numbers_of, size, axis))
            found += [*values, *boxes]
        return found

    def _moments_of(self, key: str) -> tuple[str, ...]:
        """The moments of a tensor in the checkpoint; empty if that is unknown, or if it has not even the first."""
        stored = self._stored or {}
        found = tuple(moment for moment in MOMENTS if f"{self._prefix}.{moment}.{key}" in stored)
        return found if MOMENTS[0] in found else ()

    def _numbers(self, count: int) -> range:
        self._number += count
        return range(self._number - count, self._number)

    def _kept(
        self, name: str, scales: str, piece: FlatBox, place: ShardPlace, cell: int
    ) -> tuple[torch.dtype, tuple[int, int] | None]:
        """Dtype of a moment in the checkpoint; the cell size of its scales and their dimension, if it has scales."""
        whole = piece.whole
        if self._stored is None:
            if place.in_groups:
                return torch.uint8, (cell, piece.axis)
            return torch.float32 if place.format is None else torch.bfloat16, None
        if (entry := self._stored.get(f"{scales}.{whole.key}")) is not None:
            size, dimension = cells_in(whole.global_shape, entry.shape)
            return torch.uint8, (size, dimension - whole.prepend_axis_num)
        found = self._stored.get(f"{name}.{whole.key}")
        return found.dtype if found is not None else torch.float32, None

    @torch.no_grad()
    def take(self, loaded: Sequence[Tensor]) -> None:
        """Store the values that were read.

        Args:
            loaded: contents of all boxes returned by `ask`.
        """
        for main, pieces, numbers in self._mains:
            main.view(-1).copy_(_joined(pieces, [loaded[number] for number in numbers]))
        for asked in self._asked:
            if asked.state is not None:
                self._take(asked, asked.state, loaded)
        for state, place, numel in self._restarted:
            for moment in place.moments:
                write(state, moment, place, 0, torch.zeros(numel, device=state[moment].device))

    def _take(self, asked: _Asked, state: Mapping[str, Tensor], loaded: Sequence[Tensor]) -> None:
        stored = _joined(asked.pieces, [loaded[number] for number in asked.values])
        if not asked.cells:
            write(state, asked.moment, asked.place, 0, stored.float())
            return
        tables, ids, known = [], [], 0
        for piece, number in zip(asked.pieces, asked.cells, strict=True):
            tables.append(triples_in(loaded[number].view(_sizes_of(piece, asked)), asked.axis))
            ids.append(_cell_ids(piece, asked) + known)
            known += len(tables[-1])
        # `ids` has one cell number per element. Cells of the same old group have equal triples and get the same id
        # here, so that the cells of the checkpoint do not matter below.
        table, same = torch.unique(torch.cat(tables).view(torch.int32), dim=0, return_inverse=True)
        _store_codes(asked, state, stored, table.view(torch.float32), same[torch.cat(ids).to(same.device)])


def _store_codes(asked: _Asked, state: Mapping[str, Tensor], codes: Tensor, table: Tensor, ids: Tensor) -> None:
    """Store FP8 elements and the id of each element's triple in `table`, in the format of this run's moments."""
    if not asked.place.in_groups:
        write(state, asked.moment, asked.place, 0, unpack(codes.unsqueeze(-1), table[ids]).squeeze(-1))
        return
    lead, numel = asked.place.lead, codes.numel()
    # Id 0: padding outside of this rank's part.
    grouped_codes, grouped_ids = to_groups(codes, lead), to_groups(ids + 1, lead)
    # A new group whose elements all have the same id is part of one old group, and keeps its codes and its triple.
    # Groups with several ids are decoded, each element with its own triple, and quantised again.
    highest = grouped_ids.amax(dim=1)
    lowest = torch.where(grouped_ids > 0, grouped_ids, highest.unsqueeze(1)).amin(dim=1)
    triples = table[highest - 1]
    torn = (lowest != highest).nonzero().flatten()
    if len(torn):
        inside = grouped_ids[torn] > 0
        known = table[(grouped_ids[torn] - 1).clamp(min=0)]
        values = unpack(grouped_codes[torn].unsqueeze(-1), known).squeeze(-1)
        packed = pack(torch.where(inside, values, 0.0), keep_positive=asked.moment == "exp_avg_sq")
        grouped_codes = grouped_codes.clone()
        grouped_codes[torn], triples[torn] = packed.codes, packed.triples
    state[asked.moment].view(-1).copy_(from_groups(grouped_codes, lead, numel))
    state[triples_of(asked.moment)].copy_(triples)


def _sizes_of(piece: FlatBox, asked: _Asked) -> tuple[int, ...]:
    return piece.cell_sizes(cell=asked.cell, width=TRIPLE, axis=asked.axis)


def _cell_ids(piece: FlatBox, asked: _Asked) -> Tensor:
    """For every element of a box, in memory order, the number of its cell among those that were read for the box."""
    axis, (begin, _) = asked.axis, piece.columns(asked.axis)
    sizes = piece.cell_sizes(cell=asked.cell, width=1, axis=axis)
    cells = torch.arange(math.prod(sizes)).view(sizes).repeat_interleave(asked.cell, dim=axis)
    return piece.to_memory(cells.narrow(axis, begin % asked.cell, piece.sizes[axis]))


def cells_in(shape: Sequence[int], scales: Sequence[int]) -> tuple[int, int]:
    """Elements of a cell, and the dimension of cells, from the shapes of a moment's two tensors.

    The size of a cell is a power of two, never 3, so the shapes differ in exactly one dimension.
    """
    axis = next(axis for axis, (size, numbers) in enumerate(zip(shape, scales, strict=True)) if size != numbers)
    return shape[axis] * TRIPLE // scales[axis], axis


def triples_in(scales: Tensor, axis: int) -> Tensor:
    """A box of scales with 3 n numbers in one dimension, as [cells, 3]: cells in the order of the box."""
    parted = scales.unflatten(axis, (-1, TRIPLE))
    return parted.movedim(axis + 1, -1).reshape(-1, TRIPLE)


def _joined(pieces: Sequence[FlatBox], parts: Sequence[Tensor]) -> Tensor:
    """Concatenate boxes of one dtype to the flat range that they were cut from."""
    assert [piece.numel for piece in pieces] == [part.numel() for part in parts], pieces
    return torch.cat([piece.to_memory(part) for piece, part in zip(pieces, parts, strict=True)])
