"""A rank holds its part of every tensor of the table: the sharded axes are those that the model shares."""

from __future__ import annotations

from mmscale.config.derived import experts_of_ranks
from mmscale.layers import LayerTensor, model_tensors
from mmscale.model.build import build_chunks
from mmscale.runtime import groups
from tests.support import Ranks, distributed
from tests.unit.layers.test_tensors import config_of, held


def of_rank(tensor: LayerTensor, *, tp: int, rank: int, ep: int, counts: dict[str, int]) -> tuple[int, ...]:
    """The shape of a rank's part."""
    shape = list(tensor.shape)
    if tensor.tp_axis is not None:
        shape[tensor.tp_axis] //= tp
    if tensor.spread and tensor.group is not None:
        shape[0] = len(experts_of_ranks(counts, ep)[tensor.group][rank])
    return tuple(shape)


@distributed(world_size=4)
def test_parts_of_ranks(ranks: Ranks) -> None:
    """tp = 2 and ep = 2: a rank holds its part of the sharded axes."""
    process_groups = groups.initialize(ranks, tp=2, ep=2)
    counts = {"text": 4, "image": 2}
    config = config_of("moma", depth={"every": 2, "capacity": 0.5}, auxiliary={"mode": "joint"}, experts={"shared": 1})
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"tp": 2, "ep": 2})})
    (built,) = build_chunks(config, process_groups)
    wanted = {
        tensor.name: of_rank(tensor, tp=2, rank=process_groups.ep.rank(), ep=2, counts=counts)
        for tensor in model_tensors(config)
    }
    assert {name: tuple(tensor.shape) for name, tensor in held(built).items()} == wanted
