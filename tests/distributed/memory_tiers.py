"""Runs of four ranks with a memory tier: trained, lost, and gone on with."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmscale.resilience import generations, snapshot_files
from mmscale.resilience.memory_tier import MemoryTier
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from tests.support import run_ranks

WORLD = 4


def folders(folder: Path) -> list[Path]:
    """Of the newest generation, by rank; those that are gone too."""
    return [snapshot_files.ROOT / name for name in generations.read_index(folder)[-1].folders]


def guard_of(folder: Path) -> int | None:
    """The process that has this folder's log open as its stderr."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "fd" / "2").readlink() == folder / snapshot_files.LOG:
                    return int(entry.name)
            except OSError:
                continue
    return None


def until(condition: Callable[[], bool], what: str, *, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def lose(folder: Path) -> None:
    """As if its node were gone: no guard, no memory."""
    pid = guard_of(folder)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    until(lambda: guard_of(folder) is None, "a killed guard lives")
    snapshot_files.remove_folder(folder)


def tier(ranks: RankEnv, folder: Path, *, identity: Mapping[str, Any] | None = None, **options: Any) -> MemoryTier:
    def heard(event: str, **fields: Any) -> None:
        with (folder / "events").open("a") as file:
            file.write(json.dumps({"event": event, **fields}) + "\n")

    return MemoryTier(
        folder,
        env=ranks,
        group=process_groups.host_group(),
        **{"every": 1, "group_size": 4, "hold_s": 60.0, "attempt": 1, **options},
        identity=identity or {"config_digest": "a"},
        on_event=heard,
    )


def started(made: MemoryTier, folder: Path) -> MemoryTier:
    made.start()
    if made.generation is not None:
        (folder / "seen" / made.generation.folders[made.env.rank]).touch()
    return made


def events(folder: Path) -> list[dict[str, Any]]:
    file = folder / "events"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def content(rank: int, step: int) -> dict[str, Tensor]:
    """Unequal sizes, several types, an empty tensor; different for every rank and step."""
    drawn = torch.Generator().manual_seed(1000 * step + rank)
    return {
        "large": torch.randn(40_000 + 7_001 * rank, generator=drawn),
        "half": torch.randn(33, 5, generator=drawn).to(torch.bfloat16),
        "empty": torch.empty(0),
        "mask": torch.rand(17, generator=drawn) > 0.5,
        "count": torch.tensor(step),
    }


def live(folder: Path, *, steps: int, world: int = WORLD, **options: Any) -> None:
    """A life that takes snapshots and then is gone without a word."""

    def ranks_do(ranks: RankEnv) -> None:
        process_groups.start(ranks)
        made = started(tier(ranks, folder, **options), folder)
        for step in range(1, steps + 1):
            assert made.snapshot(step, content(ranks.rank, step), {"step": step, "rank": ranks.rank})
            assert made.wait()
            torch.distributed.barrier()
        os._exit(0)

    run_ranks(ranks_do, world_size=world, timeout_s=300)


def go_on(folder: Path, *, above: int = 0, world: int = WORLD, **options: Any) -> list[int | None]:
    """What every rank of the next life gets: the step, after all bytes were compared."""

    def ranks_do(ranks: RankEnv) -> None:
        process_groups.start(ranks)
        made = tier(ranks, folder, **{"attempt": 2, **options})
        found = made.restore(above=above, accept=lambda tensors, plain: [])
        if found is not None:
            step, tensors, plain = found
            assert plain == {"step": step, "rank": ranks.rank}
            wanted = content(ranks.rank, step)
            assert list(tensors) == list(wanted)
            for name, tensor in wanted.items():
                assert tensors[name].dtype == tensor.dtype and tensors[name].shape == tensor.shape
                assert torch.equal(tensors[name], tensor), name
        (folder / f"step_{ranks.rank}").write_text(json.dumps(found and found[0]))
        made.close()

    run_ranks(ranks_do, world_size=world, timeout_s=300)
    return [json.loads((folder / f"step_{rank}").read_text()) for rank in range(world)]
