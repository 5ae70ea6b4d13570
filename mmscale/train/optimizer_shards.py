"""The distributed optimizer's state, saved where it lies: every data-parallel rank writes the part that it owns.

megatron-core's `fully_reshardable` format gathers master weights and moments of all ranks on every rank before a save:
12 bytes per parameter through the network while training waits. The same tensors are described here as boxes of each
rank's own part, so that nothing is sent. Names, shapes and values on disk are the same, and loading is megatron-core's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

_PREFIX = "optimizer.state"
_STATES = ("param", "exp_avg", "exp_avg_sq")
Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes


class ShardwiseOptimizer(DistributedOptimizer):
    """megatron-core's distributed optimizer, saving without communication; an instance is made by `save_shardwise`."""

    def sharded_param_state_fully_reshardable(
        self,
        model_sharded_state_dict: ShardedStateDict,
        is_loading: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict | None:
        """This rank's part of master weights and moments, as boxes of the global tensors.

        Args:
            model_sharded_state_dict: says where each parameter stands in its global tensor.
            is_loading: then megatron-core's own way: every rank asks for its parameters as a whole.
            metadata: how megatron-core names and cuts state.
        """
        if is_loading:
            return super().sharded_param_state_fully_reshardable(model_sharded_state_dict, is_loading, metadata)
        sharded, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
        places = {entry.data: entry for entry in nested_values(sharded)}
        state: dict[str, ShardedTensor] = {}
        for buckets in self.gbuf_ranges:
            for by_bucket in buckets.values():
                for bucket in by_bucket:
                    for parameter, ranges in bucket["param_map"].items():
                        owned = ranges["param"]
                        tensors = self._get_main_param_and_optimizer_states(parameter)
                        for name in _STATES:
                            part = tensors[name].detach().view(-1)
                            for box in _boxes_of(places[parameter], parameter, name, part, owned.start, owned.end):
                                state[str(len(state))] = box
        return state


def save_shardwise(optimizer: MegatronOptimizer) -> None:
    """Let every distributed optimizer in it save what it owns, without gathering."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if type(part) is DistributedOptimizer:
            part.__class__ = ShardwiseOptimizer  # get_megatron_optimizer names its class; only a method differs


def _boxes_of(
    place: ShardedTensor | ShardedTensorFactory, parameter: Tensor, state: str, part: Tensor, start: int, end: int
) -> Iterator[ShardedTensor]:
    """The owned elements [start, end) of a parameter's state, as pieces of its global tensor (or tensors: SwiGLU's)."""
    assert part.numel() == end - start, (place.key, part.numel(), start, end)
    for whole in _tensors(place, parameter):
        assert whole.data is not None and whole.data.is_contiguous(), whole.key
        first = whole.data.storage_offset() - parameter.storage_offset()  # where this piece begins in the parameter
        low, high = max(start, first), min(end, first + whole.data.numel())
        if low >= high:
            continue
        at = low
        for offsets, sizes in boxes(whole.data.shape, low - first, high - first):
            numel = math.prod(sizes)
            yield _shard(whole, f"{_PREFIX}.{state}.{whole.key}", part[at - start : at - start + numel], offsets, sizes)
            at += numel


def _tensors(place: ShardedTensor | ShardedTensorFactory, parameter: Tensor) -> list[ShardedTensor]:
    if isinstance(place, ShardedTensorFactory):
        return list(nested_values(replace(place, data=parameter.detach()).build()))
    return [replace(place, data=parameter.detach())]


def _shard(whole: ShardedTensor, key: str, data: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> ShardedTensor:
    """A box of a tensor of any sharding; on no regular grid, because ranks own different numbers of elements."""
    prepended = whole.prepend_axis_num
    assert len(whole.replica_id) == 3, whole  # (pipeline, tensor, data-parallel), by megatron-core's convention
    return ShardedTensor(
        key=key,
        data=data.view((1,) * prepended + tuple(sizes)),
        dtype=data.dtype,
        local_shape=(1,) * prepended + tuple(sizes),
        global_shape=whole.global_shape,
        global_offset=(
            *whole.global_offset[:prepended],
            *(begin + offset for begin, offset in zip(whole.global_offset[prepended:], offsets, strict=True)),
        ),
        axis_fragmentations=None,
        replica_id=(*whole.replica_id[:2], 0),  # no other data-parallel rank has these elements
        allow_shape_mismatch=whole.allow_shape_mismatch,
    )


def boxes(shape: Sequence[int], start: int, end: int) -> Iterator[Box]:
    """Cut the flat range [start, end) of a row-major tensor into boxes, in the order of their elements.

    At most 2 * dimensions - 1 of them: the rest of a row, whole rows, the beginning of a row, and so on inside.
    """
    if start >= end:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row
    if first > last:  # both ends inside one row
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
