"""A rank's box of a tensor that ranks split into unequal parts, for megatron-core's checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensor
from torch import Tensor


def box_of(
    key: str,
    data: Tensor,
    *,
    axes: Mapping[int, tuple[int, int]],
    replica_id: ReplicaId,
    offsets: tuple[tuple[int, int, int], ...] = (),
) -> ShardedTensor:
    """The place of this rank's data in the global tensor, as offset and size in every dimension.

    `ShardedTensor.from_rank_offsets` requires equal shards. A box may have any offset and size, so torch's checkpoint
    code checks that boxes neither overlap nor leave gaps.

    Args:
        key: of the global tensor.
        data: this rank's part.
        axes: for each sharded axis of the data the first global index and the global size; other axes are complete.
        replica_id: which copy of the part this is.
        offsets: axes that the caller prepended: (axis, index, size).
    """
    before = len(offsets)
    shape, first = list(data.shape), [0] * data.dim()
    for axis, (begin, size) in axes.items():
        first[axis], shape[axis] = begin, size
    return ShardedTensor(
        key=key,
        data=data,
        dtype=data.dtype,
        local_shape=(1,) * before + tuple(data.shape),
        global_shape=(*(size for _, _, size in offsets), *shape),
        global_offset=(*(index for _, index, _ in offsets), *first),
        axis_fragmentations=None,
        replica_id=replica_id,
        prepend_axis_num=before,
    )
