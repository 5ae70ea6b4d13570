"""Do the replicas of a parameter still hold the same bytes? If not: which rank is the odd one out.

Data-parallel ranks, and tensor-parallel ones where a parameter is not cut, hold copies that nothing compares: BLOOM's
layer norms were silently out of step between tensor-parallel ranks. What can be seen: tensor-parallel copies that
drifted apart, and damage since parameters were gathered, which overwrites all but a rank's own shard. What cannot: a
wrong gradient that went into the reduction, and the optimizer's shards, of which there is one copy only.

Hashing is on the host, so that hosts and devices agree. It knows no policy and writes nothing.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import ProcessGroup

from mmscale.runtime import device

Key = tuple[int, int, int, int, str]  # stage, chunk, tensor-parallel and expert-parallel rank (-1: not cut), name


@dataclass(frozen=True)
class Diverged:
    """A rank whose parameters differ from their replicas.

    Attributes:
        rank: its number in the world.
        host: where it runs.
        parameters: names of those that differ.
        certain: a majority of replicas says so; otherwise nobody can tell which one is right, and all are listed.
    """

    rank: int
    host: str
    parameters: tuple[str, ...]
    certain: bool


@dataclass(frozen=True)
class _Replica:
    """One parameter of this rank."""

    key: Key
    digest: int
    expert: bool
    cut: bool


def find_diverged(chunks: Sequence[torch.nn.Module], groups: ProcessGroupCollection) -> list[Diverged]:
    """Compare all replicas of all parameters; the same answer on every rank. Every rank calls it.

    As long as all are equal it costs one hash of the parameters and at most five reductions of 16 bytes a parameter.

    Args:
        chunks: model chunks of this rank, wrapped or not; the newest parameters have arrived.
        groups: process groups.
    """
    mine = list(_replicas(chunks, groups))
    doubtful: set[Key] = set()
    of_group: tuple[tuple[ProcessGroup, Callable[[_Replica], bool]], ...] = (
        (groups.dp_cp, lambda replica: not replica.expert),
        (groups.expt_dp, lambda replica: replica.expert),
        (groups.tp, lambda replica: not replica.expert and not replica.cut),
        (groups.expt_tp, lambda replica: replica.expert and not replica.cut),
    )
    for group, belongs in of_group:
        doubtful |= _unequal([replica for replica in mine if belongs(replica)], group)
    anyone = torch.tensor([int(bool(doubtful))], device=device.taken())
    torch.distributed.all_reduce(anyone, op=torch.distributed.ReduceOp.MAX)
    if not int(anyone):
        return []
    # From here on cost does not matter.
    everyones = set().union(*_gathered(doubtful))
    held = _gathered((socket.gethostname(), {r.key: r.digest for r in mine if r.key in everyones}))
    return blame([host for host, _ in held], [digests for _, digests in held])


def blame(hosts: Sequence[str], digests: Sequence[Mapping[Key, int]]) -> list[Diverged]:
    """Who differs, by majority for each parameter.

    Args:
        hosts: host name of each rank.
        digests: of each rank, for the parameters that differ somewhere.
    """
    certain: dict[int, list[str]] = {}
    suspected: dict[int, list[str]] = {}
    for key in sorted({key for rank in digests for key in rank}):
        found = {rank: held[key] for rank, held in enumerate(digests) if key in held}
        (common, times), *others = Counter(found.values()).most_common()
        if not others:
            continue
        clear = times > len(found) / 2
        for rank, digest in found.items():
            if not clear or digest != common:
                (certain if clear else suspected).setdefault(rank, []).append(key[-1])
    return [
        Diverged(rank, hosts[rank], tuple(names), certain=clear)
        for table, clear in ((certain, True), (suspected, False))
        for rank, names in sorted(table.items())
    ]


def _replicas(chunks: Sequence[torch.nn.Module], groups: ProcessGroupCollection) -> Iterator[_Replica]:
    for index, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            # The marks that megatron-core's gradient norm and optimizer go by.
            expert = not getattr(parameter, "allreduce", True)
            cut = bool(getattr(parameter, "tensor_model_parallel", False))
            tensor_rank = (groups.expt_tp if expert else groups.tp).rank() if cut else -1
            expert_rank = groups.ep.rank() if expert else -1
            key = (groups.pp.rank(), index, tensor_rank, expert_rank, name)
            yield _Replica(key, _digest(parameter), expert, cut)


def _digest(parameter: Tensor) -> int:
    content = parameter.detach().reshape(-1).view(torch.uint8).cpu().numpy()
    value = xxhash.xxh3_64_intdigest(content.data)
    return value - 2**64 if value >= 2**63 else value  # as torch's int64


def _unequal(replicas: Iterable[_Replica], group: ProcessGroup) -> set[Key]:
    """Parameters whose digests are not the same on all ranks of the group."""
    mine = list(replicas)
    if group.size() == 1 or not mine:  # all ranks of a group hold the same parameters
        return set()
    digests = torch.tensor([replica.digest for replica in mine], device=device.taken())
    extremes = torch.stack((digests, ~digests))  # ~ turns the order around: one reduction gives maximum and minimum
    torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX, group=group)
    unequal = (extremes[0] != ~extremes[1]).tolist()
    return {replica.key for replica, differs in zip(mine, unequal, strict=True) if differs}


def _gathered(mine: Any) -> list[Any]:
    everyones: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyones, mine)
    return everyones
