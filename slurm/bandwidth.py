# Bandwidth of all-reduces inside nodes and between them: `srun --ntasks-per-node=GPUS python -m slurm.bandwidth`.
# It measures and prints. The profile has the minimum values, and launch/nodes.py acts on the results.
"""How fast the ranks of a job are together, before they train.

One JSON object a line: each node's own figure as soon as it is known (`inside`), then one for each pair of neighbours
(`pair`), then all together (`all`). Lines that are missing say whom the others wait for. Nodes are paired twice, as
0-1, 2-3, ... and as 1-2, 3-4, ..., so that a slow node is distinguished from its healthy partner: it is slow with
both. Pairs without a node in common are measured at once, which takes the same time for any number of nodes, except for
creating groups.

Bandwidths are bus bandwidths as nccl-tests defines them, 2 (n - 1) / n * bytes / seconds: what a link carried, whatever
the number of ranks, so that one threshold serves jobs of every size.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mmscale.runtime import device
from mmscale.runtime.rank_env import RankEnv, discover

_WARM_UP, _ROUNDS = 2, 5


def pairs(nodes: int) -> list[tuple[int, int]]:
    """Pairs of neighbouring nodes. Every node is in two pairs (in one if there are two nodes, or at the ends)."""
    first = [(node, node + 1) for node in range(0, nodes - 1, 2)]
    second = [(node, (node + 1) % nodes) for node in range(1, nodes, 2) if nodes > 2]
    return first + [pair for pair in second if pair[0] != pair[1]]


def measure(group: dist.ProcessGroup | None, *, megabytes: float, rounds: int = _ROUNDS) -> float:
    """Bus bandwidth of an all-reduce in a group [GB/s]; every rank of it calls this.

    The median of some rounds: the first ones open connections, and others use the network too.
    """
    size = dist.get_world_size(group)
    values = torch.zeros(max(1, int(megabytes * 1e6 / 4)), device=device.taken())
    seconds = []
    for _ in range(_WARM_UP + rounds):
        dist.barrier(group)
        device.synchronize()
        began = time.perf_counter()
        dist.all_reduce(values, group=group)
        device.synchronize()
        seconds.append(time.perf_counter() - began)
    median = sorted(seconds[_WARM_UP:])[rounds // 2]
    return 2 * (size - 1) / size * values.numel() * 4 / median / 1e9


def run(env: RankEnv, *, megabytes: float) -> None:
    """Measure inside nodes, between neighbours and over all ranks; print each result as soon as it is known."""
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    local, count = env.local_world_size, env.world_size // env.local_world_size
    node = env.rank // local
    if local > 1:
        inside, _ = dist.new_subgroups(local)
        speed = measure(inside, megabytes=megabytes)
        if env.local_rank == 0:
            _emit(node=name, inside=speed)
    elif env.local_rank == 0:
        _emit(node=name)
    if count == 1:
        return
    names: list[Any] = [None] * env.world_size
    dist.all_gather_object(names, name)
    # Create all groups first: every rank takes part in creating each, and would wait for the pair that is measured.
    groups = {}
    for one, other in pairs(count):
        members = [rank for place in (one, other) for rank in range(place * local, (place + 1) * local)]
        groups[one, other] = dist.new_group(members)
    for (one, other), group in groups.items():
        if node in (one, other):
            speed = measure(group, megabytes=megabytes)
            if env.rank == one * local:
                _emit(pair=[names[one * local], names[other * local]], between=speed)
    speed = measure(None, megabytes=megabytes)
    if env.rank == 0:
        _emit(ranks=env.world_size, all=speed)


def _emit(**fields: Any) -> None:
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in fields.items()}
    sys.stdout.write(json.dumps(rounded) + "\n")  # one write, so that lines of several ranks do not mix
    sys.stdout.flush()


def main() -> int:
    """Join the ranks of srun, torchrun or mpirun, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=64.0, help="of each all-reduce [MB]")
    parser.add_argument("--timeout-s", type=float, default=120.0, help="of each collective [s]")
    given = parser.parse_args()
    env = discover()
    if env.world_size == 1:
        return 0  # there is no other rank
    own = device.current_device(env.local_rank)
    dist.init_process_group(
        device.backend(),
        init_method=env.init_method,
        rank=env.rank,
        world_size=env.world_size,
        timeout=timedelta(seconds=given.timeout_s),
        device_id=own if own.type == "cuda" else None,
    )
    run(env, megabytes=given.mb)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
