"""Compares the bytes of replicated parameters and identifies the rank that differs.

Data-parallel ranks, and tensor-parallel ranks if a parameter is not sharded, hold copies that training never compares:
BLOOM's layer norms silently diverged between tensor-parallel ranks. This module detects tensor-parallel copies that
drifted apart, and damage since parameters were gathered, which overwrites everything but a rank's own shard. It cannot
detect a wrong gradient that went into the reduction, or damage in optimizer shards, which have only one copy.

Hashes are computed on the host, so that hosts and devices agree. This module contains no policy and writes nothing.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import xxhash
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import ProcessGroup

from mmscale.runtime import device
from mmscale.runtime.groups import gathered

Key = tuple[int, int, int, int, str]  # stage, chunk, tensor-parallel and expert-parallel rank (-1: not sharded), name


@dataclass(frozen=True)
class Diverged:
    """A rank whose parameters differ from their replicas.

    Attributes:
        rank: its number in the world.
        host: where it runs.
        parameters: names of those that differ.
        certain: found by a majority of replicas; otherwise it is unknown which one is right, and all are listed.
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
    """Compare all replicas of all parameters; the result is the same on every rank. Every rank calls it.

    If all are equal, the cost is one hash of the parameters and at most five reductions of 16 bytes per parameter.

    Args:
        chunks: model chunks of this rank, wrapped or not; the newest parameters have been gathered.
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
    # This path is rare, so its cost does not matter.
    everyones = set().union(*gathered(doubtful))
    held = gathered((socket.gethostname(), {r.key: r.digest for r in mine if r.key in everyones}))
    return blame([host for host, _ in held], [digests for _, digests in held])


def blame(hosts: Sequence[str], digests: Sequence[Mapping[Key, int]]) -> list[Diverged]:
    """Ranks that differ, by majority for each parameter.

    Args:
        hosts: host name of each rank.
        digests: of each rank, for the parameters that differ on some rank.
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
            # The attributes that megatron-core's gradient norm and optimizer use.
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
    extremes = torch.stack((digests, ~digests))  # ~ reverses the order: one reduction gives maximum and minimum
    torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX, group=group)
    unequal = (extremes[0] != ~extremes[1]).tolist()
    return {replica.key for replica, differs in zip(mine, unequal, strict=True) if differs}
