"""Benchmarks one GPU: eight measurements with predictions and floors, in two runs of at most 8 minutes.

    mmscale bench gpu --part 1 --out gpu-1.json   ceilings, experts in bf16 and FP8, token choice, routing, depth layer
    mmscale bench gpu --part 2 --out gpu-2.json   training steps of layer stacks, and correctness checks

Communication between GPUs is not measured. `--device cpu --tiny` runs the same code on a CPU, to try it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from mmscale.bench import gpu_checks, gpu_kernels, gpu_layers
from mmscale.bench.gpu_session import Session
from mmscale.bench.gpu_shapes import FULL, TINY
from mmscale.errors import ConfigError, UsageError
from mmscale.runtime import device, groups, transformer_engine
from mmscale.runtime.rank_env import RankEnv

SECONDS = 480.0


def run(
    *,
    part: int = 0,
    device: str = "cuda",
    tiny: bool = False,
    repeats: int = 20,
    seconds: float = SECONDS,
    steps: int = 200,
    out: str = "",
) -> dict[str, Any]:
    """Measure.

    Args:
        part: 1, 2, or 0 for both.
        device: "cuda", or "cpu" to try it without one.
        tiny: sizes for which every row takes moments; the numbers have no meaning.
        repeats: timed calls of each row.
        seconds: no new row begins after this time.
        steps: of the runs whose losses are compared.
        out: JSON file, written after every row.

    Returns:
        `device`, `torch`, `transformer_engine`, `date`, `shape`, `ceilings`, `rows`, `checks`.

    Raises:
        UsageError: an option is out of range.
        ConfigError: there is no such device.
    """
    _check(part=part, device=device, repeats=repeats, seconds=seconds, steps=steps)
    session = Session(TINY if tiny else FULL, repeats, time.monotonic() + seconds, Path(out) if out else None)
    session.facts |= {"part": part, "transformer_engine": transformer_engine.version()}
    own_groups = not torch.distributed.is_initialized()
    if own_groups:
        groups.initialize(RankEnv(), seed=1234)
    try:
        gpu_layers.warm_up()
        gpu_kernels.ceilings(session)
        if part in (0, 1):
            gpu_kernels.expert_networks(session)
            gpu_kernels.expert_fp8(session)
            gpu_layers.token_choice(session)
            gpu_kernels.routing(session)
            gpu_layers.depth_layer(session)
        if part in (0, 2):
            gpu_checks.run(session, steps=steps)
            gpu_layers.stacks(session)
    finally:
        if own_groups:
            groups.finalize()
    session.write()
    return session.result()


def _check(*, part: int, device: str, repeats: int, seconds: float, steps: int) -> None:
    if part not in (0, 1, 2):
        raise UsageError(f"bench gpu: there is no part {part}", remedy="--part 1, --part 2, or neither for both")
    if device not in ("cuda", "cpu"):
        raise UsageError(f"bench gpu: {device} is no device", remedy="--device cuda or --device cpu")
    for name, value, least in (("repeats", repeats, 1), ("steps", steps, 10), ("seconds", seconds, 1)):
        if not isinstance(value, int | float) or value < least:
            raise UsageError(f"bench gpu: --{name} {value} is too small", remedy=f"give at least {least}")
    _check_device(device)


def _check_device(wanted: str) -> None:
    if wanted == "cuda" and not device.has_cuda():
        raise ConfigError(
            "bench gpu: there is no CUDA device",
            remedy="try it with --device cpu --tiny, or see docs/gpu.md for a machine with a GPU",
        )
    if wanted == "cpu" and device.has_cuda():
        raise ConfigError(
            "bench gpu: --device cpu where there is a CUDA device", remedy="hide it: CUDA_VISIBLE_DEVICES= mmscale ..."
        )


def render(result: dict[str, Any]) -> str:
    """Tables for people, in the form of the README's."""
    lines = [
        f"{result['device']}, torch {result['torch']}, Transformer-Engine {result['transformer_engine'] or 'none'}, "
        f"{result['date']}; {result['repeats']} calls a row; predictions are for one H100",
        "",
        "| | measured | min / median / max, ms | predicted, ms | floor, ms | TFLOP/s | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        times = " / ".join(_number(value) for value in row["ms"]) if row["ms"] else "not measured"
        cells = (
            row["number"],
            row["name"],
            times,
            _number(row["predicted_ms"]),
            _number(row["floor_ms"]),
            _number(row["tflops"]),
            row["note"],
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if result["checks"]:
        lines += ["", "| is it right? | difference | limit | | |", "|---|---|---|---|---|"]
        for check in result["checks"]:
            verdict = {True: "passed", False: "**failed**", None: "not measured"}[check["passed"]]
            value = "" if check["value"] is None else f"{check['value']:.2e}"
            lines.append(f"| {check['name']} | {value} | {check['limit']:g} | {verdict} | {check['note']} |")
    if (ratio := result.get("depth_layer_over_dense")) is not None:
        lines += ["", f"A layer that processes a quarter of the tokens takes {ratio:.3f} of the time of one for all."]
    stacks = result.get("stacks")
    if stacks and stacks["mfu"]:
        lines += ["", f"MFU of {stacks['peak_tflops']:g} TFLOP/s (bf16 data sheet, also for FP8):"]
        lines += [f"* {name}: {value:.1%}" for name, value in stacks["mfu"].items()]
    if stacks and stacks["moma_over_dense"]:
        lines += ["", "Forward and backward of the stack with experts over the dense one of equal layers and FLOPs:"]
        lines += [f"* {name}: {value:.3f}" for name, value in stacks["moma_over_dense"].items()]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
