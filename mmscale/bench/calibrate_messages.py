"""Latency and bandwidth of messages between ranks of this machine, for `mmscale bench calibrate`.

python -m mmscale.bench.calibrate_messages --folder FOLDER     # on each rank
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mmscale import bounded
from mmscale.errors import LaunchError
from mmscale.runtime import device, groups, local_ranks, rank_env

_RESULT = "messages.json"
_SMALL, _LARGE = 1 << 10, 1 << 24  # bytes of a message to each rank
_CALLS = {_SMALL: 50, _LARGE: 5}
_ROUNDS = 5


@dataclass(frozen=True)
class Messages:
    """Messages between ranks.

    Attributes:
        latency: seconds until a short message arrives.
        bandwidth: bytes per second that a rank sends.
    """

    latency: float
    bandwidth: float


def measure(nproc: int) -> Messages:
    """Start ranks on this machine and time all-to-all messages between them.

    Raises:
        LaunchError: a rank failed.
    """
    with tempfile.TemporaryDirectory(prefix="mmscale-bench-") as name:
        status = local_ranks.run_local(
            nproc,
            [f"--folder={name}"],
            log_dir=Path(name) / "logs",
            environ={**os.environ, "PYTHONWARNINGS": "ignore"},
            program=(sys.executable, "-m", "mmscale.bench.calibrate_messages"),
        )
        if status:
            raise LaunchError(f"a rank of the benchmark ended with exit status {status}")
        return Messages(**bounded.read_object(Path(name) / _RESULT))


def _seconds(size: int) -> float:
    """The shortest exchange in which each rank sends `size` bytes to each other rank."""
    ranks = torch.distributed.get_world_size()
    sent = torch.zeros(ranks * size // 4, device=device.taken())
    received, found = torch.empty_like(sent), []
    for _ in range(_ROUNDS):
        torch.distributed.barrier()
        begin = time.perf_counter()
        for _ in range(_CALLS[size]):
            torch.distributed.all_to_all_single(received, sent)
        device.synchronize()
        found.append((time.perf_counter() - begin) / _CALLS[size])
    return min(found)


def main() -> None:
    """One rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    folder = parser.parse_args().folder
    ranks = rank_env.discover()
    groups.start(ranks)
    found = timed(ranks.world_size)
    if ranks.rank == 0:
        (folder / _RESULT).write_text(json.dumps(asdict(found)))
    groups.finalize()


def timed(world_size: int) -> Messages:
    """Time messages between all ranks, on each of them; torch.distributed has been started."""
    short, long = _seconds(_SMALL), _seconds(_LARGE)
    bandwidth = (world_size - 1) * (_LARGE - _SMALL) / max(long - short, 1e-9)
    return Messages(latency=short, bandwidth=bandwidth)


if __name__ == "__main__":
    main()
