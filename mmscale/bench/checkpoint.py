"""Measures saves: milliseconds that training waits, seconds to the commit; compared with megatron-core and torch.

Ranks of this machine save a real model with its optimizer; all methods alternate in every round, so that a busy machine
slows all of them. Then: verification, loading, the zarr archive and back, and a snapshot in memory. Nothing is read
from a cold disk.

    mmscale bench checkpoint --gigabytes 1 --nproc 2 --repeats 5
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mmscale import bounded
from mmscale.bench import memory
from mmscale.bench.saves import OURS, PEERS, WAYS, Measured, Save, timed
from mmscale.checkpoint import archive, rewrite
from mmscale.checkpoint.layout import Store
from mmscale.checkpoint.tensors import open_tensors
from mmscale.config import Config
from mmscale.errors import LaunchError, UsageError
from mmscale.plan import count_parameters
from mmscale.runtime import device, groups, local_ranks, rank_env
from mmscale.runtime.rank_env import RankEnv

_RESULT = "result.json"
_BYTES = 14  # bytes per parameter: bf16 weight, fp32 master weight and two moments


def run(
    *,
    gigabytes: float = 1.0,
    nproc: int = 2,
    repeats: int = 5,
    folder: str = "",
    ways: Sequence[str] | str = WAYS,
    archives: bool = True,
) -> dict[str, Any]:
    """Start ranks on this machine and measure.

    Args:
        gigabytes: of the whole state [GB].
        nproc: ranks.
        repeats: rounds, after one to warm up.
        folder: to write into; a temporary folder if empty.
        ways: of WAYS; sync and async are always included, for the ratios.
        archives: also measure the archive and the snapshot in memory.

    Returns:
        `machine`, `torch`, `ranks`, `state_bytes`, `repeats`; `saves` (by way: `blocked_ms`, `total_ms` as min, median,
        max), `ratios` (within a round: min, median, max), `integrity_share` of the time of a save, `step_s`,
        `verify_s`, `load_s`, `archive`, `memory`.

    Raises:
        UsageError: there is no such way to save.
        LaunchError: a rank failed.
    """
    asked = (ways,) if isinstance(ways, str) else tuple(ways)
    if unknown := [way for way in asked if way not in WAYS]:
        raise UsageError(
            f"bench checkpoint: no way to save is called {unknown[0]}", remedy=f"there are {', '.join(WAYS)}"
        )
    chosen = ",".join(way for way in WAYS if way in (*OURS, *asked))
    with tempfile.TemporaryDirectory(prefix="mmscale-bench-", dir=folder or None) as name:
        options = {
            "gigabytes": gigabytes,
            "repeats": repeats,
            "archives": int(archives),
            "ways": chosen,
            "folder": name,
        }
        status = local_ranks.run_local(
            nproc,
            [f"--{key}={value}" for key, value in options.items()],
            log_dir=Path(name) / "logs",
            environ={**os.environ, "PYTHONWARNINGS": "ignore"},  # printed once by the parent process
            program=(sys.executable, "-m", "mmscale.bench.checkpoint"),
        )
        if status:
            raise LaunchError(f"a rank of the benchmark ended with exit status {status}")
        result: dict[str, Any] = bounded.read_object(Path(name) / _RESULT)
    return result


def model_of(gigabytes: float) -> Config:
    """4 text + 4 image experts, with the expert width whose state comes nearest to a size."""

    def of_width(width: int) -> Config:
        experts = {"counts": {"text": 4, "image": 4}, "share": {"text": 0.5, "image": 0.5}}
        hidden = 512 if gigabytes >= 0.3 else 64
        return Config.model_validate(
            {
                "vocab": {"modalities": [{"name": "text", "size": 8 * hidden}, {"name": "image", "size": 2 * hidden}]},
                "model": {
                    "kind": "moma",
                    "num_layers": 4,
                    "hidden_size": hidden,
                    "ffn_hidden_size": width,
                    "num_attention_heads": hidden // 64,
                    "seq_length": 256,
                    "experts": experts,
                },
                "train": {"micro_batch_size": 1, "global_batch_size": 8},
            }
        )

    return min(
        (of_width(64 * blocks) for blocks in range(1, 129)),
        key=lambda config: abs(_BYTES * count_parameters(config).total - gigabytes * 1e9),
    )


def measure(
    config: Config, env: RankEnv, *, folder: Path, repeats: int, ways: Sequence[str] = WAYS, archives: bool = True
) -> dict[str, Any]:
    """All measurements on this rank; every rank calls it, with torch.distributed and megatron's groups initialised.

    Args:
        config: of the model.
        env: place of this rank.
        folder: an empty folder that all ranks see.
        repeats: rounds, after one to warm up.
        ways: to save, including OURS.
        archives: also measure the archive and the snapshot in memory.
    """
    measured = Measured(config, folder)
    saves: dict[str, Callable[[str], Save]] = {
        **dict.fromkeys(OURS, measured.ours),
        "megatron": measured.megatron,
        "megatron_async": measured.megatron,
        "torch_async": measured.torch_async,
    }
    rounds: list[dict[str, Save]] = []
    for _ in range(repeats + 1):
        measured.state.step += 1
        rounds.append({way: saves[way](way) for way in ways})
    rounds = rounds[1:]
    events = [fields for event, fields in measured.events if event == "save_committed"][2:]
    step_s = measured.step_times(max(4, repeats))
    manager = measured.managers["async"]
    newest = manager.choose()
    assert newest is not None
    verify_s = _elapsed(lambda: manager.problems(newest))
    load_s = _elapsed(lambda: manager.load(measured.state, newest))
    result: dict[str, Any] = {
        "machine": device.device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "ranks": measured.size,
        "parameters": count_parameters(config).total,
        "state_bytes": events[0]["bytes"] if events else 0,
        "repeats": repeats,
        "saves": {
            way: {
                "blocked_ms": _spread([1e3 * found[way].blocked for found in rounds]),
                "total_ms": _spread([1e3 * found[way].total for found in rounds]),
            }
            for way in ways
        },
        "ratios": _ratios(rounds),
        "integrity_share": _spread([fields["hash_s"] / fields["seconds"] for fields in events] or [0.0]),
        "step_s": step_s,
        "verify_s": verify_s,
        "load_s": load_s,
    }
    if archives:
        plain = "megatron" if "megatron" in ways else "sync"
        result["archive"] = _archive(measured, newest, save_s=result["saves"][plain]["total_ms"]["median"] / 1e3)
        result["memory"] = memory.measure(env, measured.tensors(), folder=folder / "memory", group_size=measured.size)
    return result


def _archive(measured: Measured, step: int, *, save_s: float) -> dict[str, float]:
    """One process writes and restores the archive; the others wait."""
    out, back = measured.folder / "archive", measured.folder / "restored"
    store: Store = measured.managers["async"].store

    def write() -> None:
        if measured.rank == 0:
            archive.write(open_tensors(store.root.parent, step), out)

    def restore() -> None:
        if measured.rank == 0:
            rewrite.into_run(archive.ArchiveTensors(out), back, origin={"made_by": "bench"})

    write_s, restore_s = _elapsed(write), _elapsed(restore)
    return {"write_s": write_s, "restore_s": restore_s, "write_over_save": write_s / save_s}


def _elapsed(work: Callable[[], object]) -> float:
    return timed(work, lambda: None).blocked


def _ratios(rounds: Sequence[dict[str, Save]]) -> dict[str, dict[str, float]]:
    """Ratios of blocked and of total seconds within a round."""
    found = {"async_blocked_over_sync": _spread([s["async"].blocked / s["sync"].blocked for s in rounds])}
    for peer in (way for way in PEERS if way in rounds[0]):
        found[f"async_blocked_over_{peer}"] = _spread([s["async"].blocked / s[peer].blocked for s in rounds])
        found[f"async_total_over_{peer}"] = _spread([s["async"].total / s[peer].total for s in rounds])
    if "megatron" in rounds[0]:
        found["sync_total_over_megatron"] = _spread([s["sync"].total / s["megatron"].total for s in rounds])
    return found


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def render(result: dict[str, Any]) -> str:
    """The result of `run` as tables for people."""

    def triple(values: dict[str, float], digits: int = 0) -> str:
        return " / ".join(f"{values[key]:.{digits}f}" for key in ("min", "median", "max"))

    lines = [
        f"{result['machine']}, {result['ranks']} ranks of {result['threads']} thread(s), torch {result['torch']}; "
        f"{result['state_bytes'] / 1e9:.2f} GB of state, {result['repeats']} rounds; min / median / max",
        "",
        "| save | training waits, ms | on the disk after, ms |",
        "|---|---|---|",
    ]
    names = {"megatron": "megatron-core", "megatron_async": "megatron-core, async", "torch_async": "torch async_save"}
    for way, times in result["saves"].items():
        name = names.get(way, f"mmscale, {way}")
        lines.append(f"| {name} | {triple(times['blocked_ms'])} | {triple(times['total_ms'])} |")
    lines += ["", "| ratio, within a round | min / median / max |", "|---|---|"]
    lines += [f"| {name.replace('_', ' ')} | {triple(values, 3)} |" for name, values in result["ratios"].items()]
    lines.append(f"| digests, of the time of a save | {triple(result['integrity_share'], 3)} |")
    step = result["step_s"]
    lines += ["", f"a step takes {step['alone']:.3f} s alone, {step['while_saving']:.3f} s while saving"]
    lines.append(f"verify {result['verify_s']:.2f} s, verify and load {result['load_s']:.2f} s")
    if "archive" in result:
        found = result["archive"]
        lines.append(
            f"archive (one process): write {found['write_s']:.2f} s, {found['write_over_save']:.2f} x a plain "
            f"synchronous save; restore {found['restore_s']:.2f} s"
        )
        lines += ["snapshot in memory:", memory.render(result["memory"])]
    return "\n".join(lines)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--archives", type=int, required=True)
    parser.add_argument("--ways", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    given = parser.parse_args()
    env = rank_env.discover()
    config = model_of(given.gigabytes)
    device.keep_host_memory()
    groups.initialize(env, seed=config.run.seed)
    ways = given.ways.split(",")
    result = measure(config, env, folder=given.folder, repeats=given.repeats, ways=ways, archives=bool(given.archives))
    if env.rank == 0:
        (given.folder / _RESULT).write_text(json.dumps(result), encoding="utf-8")
    groups.finalize()


if __name__ == "__main__":
    _main()
