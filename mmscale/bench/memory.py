"""Measures snapshots in memory: blocked ms, hashing and parity exchange in the background, rebuild of a lost rank.

    python -m mmscale.bench.memory --megabytes 256 --nproc 4

The state consists of random tensors; nothing is trained. A copy of the same bytes to ordinary memory is timed for
comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmscale import bounded
from mmscale.errors import LaunchError, TrainingError
from mmscale.resilience import snapshot_files
from mmscale.resilience.memory_tier import MemoryTier
from mmscale.runtime import groups, local_ranks, rank_env
from mmscale.runtime.rank_env import RankEnv

_RESULT = "result.json"
_TENSORS = 24


def run(*, megabytes: int = 256, nproc: int = 4, group: int = 4, repeats: int = 5) -> dict[str, Any]:
    """Start ranks on this machine and measure.

    Args:
        megabytes: state of each rank [MB].
        nproc: ranks.
        group: ranks of a parity group.
        repeats: snapshots; results are medians.

    Returns:
        The result of `measure`.

    Raises:
        LaunchError: a rank failed.
    """
    with tempfile.TemporaryDirectory(prefix="mmscale-bench-") as name:
        options = {"megabytes": megabytes, "group": group, "repeats": repeats, "folder": name}
        argv = [f"--{key}={value}" for key, value in options.items()]
        status = local_ranks.run_local(
            nproc,
            argv,
            log_dir=Path(name) / "logs",
            environ={**os.environ, "PYTHONWARNINGS": "ignore"},  # printed once by the parent process
            program=(sys.executable, "-m", "mmscale.bench.memory"),
        )
        if status:
            raise LaunchError(f"a rank of the benchmark ended with exit status {status}")
        result: dict[str, Any] = bounded.read_object(Path(name) / _RESULT)
    return result


def measure(
    env: RankEnv, tensors: dict[str, Tensor], *, folder: Path, group_size: int = 4, repeats: int = 5
) -> dict[str, Any]:
    """Snapshots of given tensors, and the rebuild of the last rank's from parity. Process groups must exist.

    Args:
        env: place of this rank; every rank calls it.
        tensors: state of this rank.
        folder: an empty folder that all ranks see, for the index.
        group_size: ranks of a parity group.
        repeats: snapshots; results are medians, of the slowest rank.

    Returns:
        `snapshot_blocked_ms`, `copy_ms` (the same bytes to ordinary memory), `digest_ms`, `exchange_ms`, `rebuild_s`,
        `rebuild_mb_per_s`, `restore_s` (with digests of everything), `state_mb`, `memory_overhead` (parity by state).

    Raises:
        TrainingError: snapshots could not be taken or restored.
    """
    host = groups.host_group()
    events: list[dict[str, Any]] = []

    def tier(attempt: int) -> MemoryTier:
        return MemoryTier(
            folder,
            env=env,
            group=host,
            every=1,
            group_size=group_size,
            hold_s=60.0,
            attempt=attempt,
            identity={},
            on_event=lambda event, **fields: events.append({"event": event, **fields}),
        )

    snapshots = tier(1)
    snapshots.start()
    seen: dict[str, list[float]] = {name: [] for name in ("blocked", "copy", "digest", "exchange")}
    buffers = {name: torch.empty_like(tensor, device="cpu") for name, tensor in tensors.items()}
    for step in range(1, repeats + 3):
        torch.distributed.barrier(group=host)
        began = time.perf_counter()
        for name, tensor in tensors.items():
            buffers[name].copy_(tensor)
        copied = time.perf_counter() - began
        torch.distributed.barrier(group=host)
        taken = snapshots.snapshot(step, tensors, {"step": step}) and snapshots.wait(timeout_s=600.0)
        if not _all(taken, host):
            raise TrainingError(f"the snapshot of step {step} failed: {events}")
        if step > len(snapshot_files.SLOTS):  # the first snapshot of each slot also creates its files
            figures = snapshots.statistics
            for name, value in zip(seen, (figures.copy_s, copied, figures.digest_s, figures.exchange_s), strict=True):
                seen[name].append(value)
    generation = snapshots.generation
    assert generation is not None
    lost, members = env.world_size - 1, generation.group_of(env.world_size - 1)
    if env.rank == lost:
        snapshot_files.remove_folder(snapshot_files.ROOT / generation.folders[lost])
    torch.distributed.barrier(group=host)
    began = time.perf_counter()
    found = tier(2).restore(above=0, accept=lambda restored, plain: _differing(restored, tensors))
    restored = time.perf_counter() - began
    snapshots.close()
    if len(members) > 1 and found is None:
        raise TrainingError(f"the snapshot was not restored: {events}")
    state = snapshots.statistics.bytes
    figures_of_rank = {f"{name}_ms": 1e3 * statistics.median(values) for name, values in seen.items()}
    slowest = _slowest({**figures_of_rank, "restore_s": restored}, host)
    rebuild = next((event["rebuild_s"] for event in events if event["event"] == "memory_restored"), 0.0)
    rebuild = _slowest({"rebuild_s": rebuild}, host)["rebuild_s"]
    return {
        "ranks": env.world_size,
        "group": len(members),
        "state_mb": round(state / 1e6, 1),
        "memory_overhead": round(1 / (len(members) - 1), 3) if len(members) > 1 else 0.0,
        "snapshot_blocked_ms": round(slowest.pop("blocked_ms"), 1),
        **{name: round(value, 3) for name, value in slowest.items()},
        "rebuild_s": rebuild,
        "rebuild_mb_per_s": round(state / 1e6 / rebuild, 1) if rebuild else 0.0,
    }


def render(result: dict[str, Any]) -> str:
    """The measurement as lines."""
    return "\n".join(f"{name:<20} {value}" for name, value in result.items())


def _all(value: bool, group: torch.distributed.ProcessGroup) -> bool:
    flag = torch.tensor([int(value)])
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN, group=group)
    return bool(flag.item())


def _slowest(values: dict[str, float], group: torch.distributed.ProcessGroup) -> dict[str, float]:
    held = torch.tensor(list(values.values()), dtype=torch.float64)
    torch.distributed.all_reduce(held, op=torch.distributed.ReduceOp.MAX, group=group)
    return dict(zip(values, held.tolist(), strict=True))


def _differing(restored: Any, tensors: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if not torch.equal(restored[name], tensor.cpu())]


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--nproc", type=int, default=4)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if "RANK" not in os.environ:
        result = run(megabytes=given.megabytes, nproc=given.nproc, group=given.group, repeats=given.repeats)
        sys.stdout.write(render(result) + "\n")
        return
    env = rank_env.discover()
    groups.start(env)
    drawn = torch.Generator().manual_seed(env.rank)
    elements = given.megabytes * 1_000_000 // 4 // _TENSORS
    tensors = {f"tensor.{index}": torch.randn(elements, generator=drawn) for index in range(_TENSORS)}
    result = measure(env, tensors, folder=given.folder, group_size=given.group, repeats=given.repeats)
    if env.rank == 0:
        (given.folder / _RESULT).write_text(json.dumps(result), encoding="utf-8")
    groups.finalize()


if __name__ == "__main__":
    _main()
