"""Gives every rank the whole matrices that it orthogonalises, and every shard its part of the result.

megatron-core's distributed optimizer cuts parameters into flat shards, one for each data-parallel rank, and tensor
parallelism cuts matrices. An orthogonalised matrix depends on all of its elements, so every unit (matrix_layout.py) has
one owner among the ranks that hold the same model or experts: a data-parallel rank d and a tensor-parallel rank t. One
exchange within data-parallel groups moves a unit's parts to the ranks d, one within tensor-parallel groups to the rank
t, and two more bring the result back. Every matrix is orthogonalised once, whole, whatever the layout.

Owners are assigned by cost, so that ranks finish at about the same time. All ranks compute the same assignment.
Large models are done in several rounds, which bounds the memory of messages and results.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.distributed import ProcessGroup

from mmscale.layers.matrices import ROUND_ELEMENTS, newton_schulz_flops
from mmscale.train.optim.matrix_layout import MatrixLayout

Function = Callable[[Tensor], Tensor]  # of a stack of matrices: [B, R, C] -> [B, R, C]


@dataclass(frozen=True, eq=False)
class Unit:
    """A range of a parameter that contains whole matrices.

    Attributes:
        parameter: of the model.
        layout: of its matrices.
        start, end: range of elements of this tensor-parallel rank's parameter.
        owner: data-parallel and tensor-parallel rank that orthogonalises it. If tensor parallelism does not share the
            parameter, every tensor-parallel rank orthogonalises its own copy.
        held: the range of each data-parallel rank's shard inside [start, end); may be empty.
    """

    parameter: Tensor
    layout: MatrixLayout
    start: int
    end: int
    owner: tuple[int, int]
    held: tuple[tuple[int, int], ...]

    @property
    def shared(self) -> bool:
        """Whether tensor-parallel ranks hold different parts of it."""
        return self.layout.join_axis is not None

    @property
    def cost(self) -> float:
        """FLOPs of one step of Newton-Schulz."""
        stacks = self.layout.stacks
        return sum(stack.count * newton_schulz_flops(stack.rows, stack.columns, steps=1) for stack in stacks)


def exchanges_of(
    optimizer: DistributedOptimizer, layouts: Mapping[Tensor, MatrixLayout], tensor_parallel: ProcessGroup
) -> list[MatrixExchange]:
    """The exchanges that orthogonalise all matrices of one distributed optimizer, in rounds of `ROUND_ELEMENTS`.

    Args:
        optimizer: megatron-core's, with at least one parameter on this rank.
        layouts: of parameters that Muon updates; others are ignored.
        tensor_parallel: group of ranks that share these parameters.
    """
    rows, columns = optimizer.data_parallel_group, tensor_parallel
    work = {(row, column): 0.0 for row in range(rows.size()) for column in range(columns.size())}
    device = optimizer.buffers[0].grad_data.device
    return [
        MatrixExchange(with_owners(units, work), rows, columns, device)
        for units in _rounds(_units(optimizer, layouts), limit=ROUND_ELEMENTS * rows.size())
    ]


class MatrixExchange:
    """Units that are orthogonalised together.

    Args:
        units: with owners, in the same order on all ranks of both groups.
        rows: data-parallel group.
        columns: tensor-parallel group.
        device: of the parameters.
    """

    def __init__(self, units: Sequence[Unit], rows: ProcessGroup, columns: ProcessGroup, device: torch.device) -> None:
        self.units, self.rows, self.columns, self.device = units, rows, columns, device
        # Where this rank's shard of each parameter begins; the units of a parameter cover all of it.
        self._first: dict[Tensor, int] = {}
        for unit in self.units:
            begin, end = unit.held[self.rows.rank()]
            if begin < end:
                self._first.setdefault(unit.parameter, begin)

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters with a unit of which this rank has elements."""
        return list(self._first)

    @torch.no_grad()
    def apply(self, shards: Mapping[Tensor, Tensor], function: Function) -> dict[Tensor, Tensor]:
        """Apply a function to every whole matrix; every rank of both groups calls it.

        Args:
            shards: this rank's flat part of each of `parameters`, fp32.
            function: called on stacks of matrices of the same shape.

        Returns:
            The corresponding parts of the results, in new tensors.
        """
        parts = self._to_columns(self._to_rows(shards))
        _apply_to_stacks(parts, function, ranks=self.columns.size())
        return self._from_rows(self._from_columns(parts), shards)

    def _to_rows(self, shards: Mapping[Tensor, Tensor]) -> dict[Unit, Tensor]:
        """This tensor-parallel rank's part of every unit whose owner has this data-parallel rank."""
        row, ranks = self.rows.rank(), range(self.rows.size())
        sent = [[shards[unit.parameter][part] for unit, part in self._held(to)] for to in ranks]
        wanted = self._of_row(row)
        received = self._exchanged(sent, [[_size(unit.held[source]) for unit in wanted] for source in ranks], self.rows)
        return {unit: torch.cat([received[source][n] for source in ranks]) for n, unit in enumerate(wanted)}

    def _to_columns(self, local: Mapping[Unit, Tensor]) -> dict[Unit, list[Tensor]]:
        """The parts of all tensor-parallel ranks, for every unit that this rank orthogonalises."""
        parts = {unit: [value] for unit, value in local.items() if not unit.shared}
        mine, ranks = self._shared(self.columns.rank()), range(self.columns.size())
        sent = [[local[unit] for unit in self._shared(to)] for to in ranks]
        received = self._exchanged(sent, [[local[unit].numel() for unit in mine] for _ in ranks], self.columns)
        return parts | {unit: [received[source][n] for source in ranks] for n, unit in enumerate(mine)}

    def _from_columns(self, parts: Mapping[Unit, Sequence[Tensor]]) -> dict[Unit, Tensor]:
        """The reverse of `_to_columns`."""
        local = {unit: values[0] for unit, values in parts.items() if not unit.shared}
        mine, ranks = self._shared(self.columns.rank()), range(self.columns.size())
        sent = [[parts[unit][to] for unit in mine] for to in ranks]
        sizes = [[unit.end - unit.start for unit in self._shared(source)] for source in ranks]
        received = self._exchanged(sent, sizes, self.columns)
        for source in ranks:
            local |= zip(self._shared(source), received[source], strict=True)
        return local

    def _from_rows(self, local: Mapping[Unit, Tensor], shards: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """The reverse of `_to_rows`."""
        row, ranks = self.rows.rank(), range(self.rows.size())
        wanted = self._of_row(row)
        sent = [[local[unit][_inside(unit, to)] for unit in wanted] for to in ranks]
        sizes = [[part.stop - part.start for _, part in self._held(source)] for source in ranks]
        received = self._exchanged(sent, sizes, self.rows)
        results = {parameter: torch.empty_like(shards[parameter]) for parameter in self._first}
        for source in ranks:
            for (unit, part), value in zip(self._held(source), received[source], strict=True):
                results[unit.parameter][part] = value
        return results

    def _of_row(self, row: int) -> list[Unit]:
        return [unit for unit in self.units if unit.owner[0] == row]

    def _shared(self, column: int) -> list[Unit]:
        """Units of this row that tensor-parallel ranks share, and that this column orthogonalises."""
        return [unit for unit in self._of_row(self.rows.rank()) if unit.shared and unit.owner[1] == column]

    def _held(self, owner: int) -> Iterator[tuple[Unit, slice]]:
        """The units of a row of which this rank has elements, and where they are in its shard of the parameter."""
        for unit in self._of_row(owner):
            begin, end = unit.held[self.rows.rank()]
            if begin < end:
                first = self._first[unit.parameter]
                yield unit, slice(begin - first, end - first)

    def _exchanged(
        self, sent: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[int]], group: ProcessGroup
    ) -> list[list[Tensor]]:
        """Send flat tensors to every rank of a group, and receive tensors of these sizes from every rank."""
        if group.size() == 1:
            return [list(sent[0])]
        pieces = [piece for to in sent for piece in to]
        joined = torch.cat(pieces) if pieces else torch.empty(0, device=self.device)
        totals = [sum(source) for source in sizes]
        received = torch.empty(sum(totals), device=self.device)
        lengths = [sum(piece.numel() for piece in to) for to in sent]
        torch.distributed.all_to_all_single(received, joined, totals, lengths, group=group)
        return [list(part.split(list(own))) for part, own in zip(received.split(totals), sizes, strict=True)]


def _size(held: tuple[int, int]) -> int:
    return max(0, held[1] - held[0])


def _inside(unit: Unit, row: int) -> slice:
    """The elements of a unit that a data-parallel rank holds, counted from the unit's start."""
    begin, end = unit.held[row]
    return slice(begin - unit.start, max(begin, end) - unit.start)


def _apply_to_stacks(parts: dict[Unit, list[Tensor]], function: Function, *, ranks: int) -> None:
    """Replace the parts of units by those of the function's results; matrices of one shape are stacked."""
    stacks: dict[tuple[int, int], list[tuple[Unit, int, Tensor]]] = defaultdict(list)
    for unit, values in parts.items():
        for number, matrices in enumerate(unit.layout.matrices(values)):
            stacks[matrices.shape[-2], matrices.shape[-1]].append((unit, number, matrices))
    results: dict[Unit, dict[int, Tensor]] = defaultdict(dict)
    for entries in stacks.values():
        done = function(torch.cat([matrices for _, _, matrices in entries]))
        counts = [len(matrices) for _, _, matrices in entries]
        for (unit, number, _), result in zip(entries, done.split(counts), strict=True):
            results[unit][number] = result
    for unit, found in results.items():
        parts[unit] = unit.layout.parts([found[number] for number in range(len(found))], ranks=ranks)


def _units(optimizer: DistributedOptimizer, layouts: Mapping[Tensor, MatrixLayout]) -> Iterator[Unit]:
    """The units of an optimizer's parameters, in the order of its buffers, without owners."""
    ranks = optimizer.data_parallel_group.size()
    for buffer in optimizer.buffers:
        for parameter, (start, end, number) in buffer.param_index_map.items():
            if parameter not in layouts:
                continue
            layout, bucket = layouts[parameter], buffer.buckets[number]
            assert parameter.is_contiguous() and end - start == parameter.numel(), parameter.shape
            share = bucket.grad_data.numel() // ranks
            begins = [bucket.offset + rank * share - start for rank in range(ranks)]
            size = parameter.numel() // layout.units
            for first in range(0, parameter.numel(), size):
                held = tuple((max(first, begin), min(first + size, begin + share)) for begin in begins)
                yield Unit(parameter, layout, first, first + size, (0, 0), held)


def _rounds(units: Iterable[Unit], *, limit: int) -> Iterator[list[Unit]]:
    """Units of consecutive whole parameters, of at most `limit` elements together unless one parameter has more."""
    current: list[Unit] = []
    size = 0
    for _, group in itertools.groupby(units, key=lambda unit: id(unit.parameter)):
        own = list(group)
        numel = sum(unit.end - unit.start for unit in own)
        if current and size + numel > limit:
            yield current
            current, size = [], 0
        current += own
        size += numel
    if current:
        yield current


def with_owners(units: Sequence[Unit], work: dict[tuple[int, int], float]) -> list[Unit]:
    """Assign owners: the most expensive unit first, each to the rank with the least work so far.

    Args:
        units: in the same order on all ranks.
        work: of each data-parallel and tensor-parallel rank; that of these units is added.
    """
    columns = 1 + max(column for _, column in work)
    owners: dict[Unit, tuple[int, int]] = {}
    for unit in sorted(units, key=lambda unit: -unit.cost):
        owner = min(work, key=lambda rank: (work[rank], rank))
        owners[unit] = owner
        # A unit that ranks do not share is orthogonalised by every tensor-parallel rank.
        for column in (owner[1],) if unit.shared else range(columns):
            work[owner[0], column] += unit.cost
    return [replace(unit, owner=owners[unit]) for unit in units]
