"""Compares ways to compute experts: batched, grouped, fused or captured products, with a lower bound.

The rows of one group of experts with static capacities, forward alone and forward with backward, on this machine's
device. The ways alternate, so that a busy machine slows all of them, and ratios are taken within a round. The floor is
the same arithmetic as two plain products of one weight each, without SwiGLU, a lower bound for all ways. Routing and
exchange are not measured; `mmscale bench gpu` measures FP8.

    mmscale bench experts --hidden 512 --ffn 1408 --experts 4 --rows 512 --repeats 7

Letters: L experts, N rows of each, H hidden width, F inner width.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmscale.errors import UsageError
from mmscale.model.expert_compute import ExpertCompute, Products, feed_forward, swiglu
from mmscale.runtime import device
from mmscale.runtime.cuda_graphs import Captured

FLOOR, LOOP, BASE = "floor", "loop", "bmm"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PARTS = ("forward", "training")
# Calls per timing if kernels are queued, so that the host's time is not measured.
_QUEUED_CALLS = 10

Way = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ExpertShape:
    """One group of experts on a rank.

    Attributes:
        experts: L.
        rows: N.
        hidden: H.
        ffn: F.
    """

    experts: int
    rows: int
    hidden: int
    ffn: int

    @property
    def flops(self) -> float:
        """Floating-point operations of a forward pass; with backward three times as many."""
        return 2.0 * self.experts * self.rows * self.hidden * 3 * self.ffn


def floor(tokens: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """The arithmetic of the products with the first expert's weights for all rows, and no activation between them."""
    experts, rows, hidden = tokens.shape
    flat = tokens.reshape(experts * rows, hidden) @ w1[0].view(hidden, -1)
    return (flat[:, : w2.shape[1]] @ w2[0]).view(experts, rows, hidden)


def loop(tokens: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """One expert after the other, as a list of modules would."""
    hidden = tokens.shape[-1]
    outputs = [swiglu(tokens[e] @ w1[e].view(hidden, -1), fused=False) @ w2[e] for e in range(tokens.shape[0])]
    return torch.stack(outputs)


def ways(shape: ExpertShape, dtype: torch.dtype) -> dict[str, Way]:
    """The ways that can run here, with names as in `model.experts`, _fused for fused_swiglu, _graph for cuda_graph."""
    cuda = device.has_cuda()

    def way(products: Products, *, fused: bool = False, graph: bool = False) -> Way:
        compute = ExpertCompute(products, fused=fused)

        def function(tokens: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
            return feed_forward(tokens, w1, w2, compute=compute)

        return Captured(function) if graph else function

    found: dict[str, Way] = {FLOOR: floor, LOOP: loop, BASE: way(Products.BMM)}
    found["bmm_fused"] = way(Products.BMM, fused=True)
    aligned = shape.hidden * dtype.itemsize % 16 == 0 and shape.ffn * dtype.itemsize % 16 == 0
    if hasattr(F, "grouped_mm") and aligned and (not cuda or dtype is torch.bfloat16):
        found["grouped_mm"] = way(Products.GROUPED_MM)
        found["grouped_mm_fused"] = way(Products.GROUPED_MM, fused=True)
    if cuda:
        found["bmm_fused_graph"] = way(Products.BMM, fused=True, graph=True)
    return found


def run(
    *,
    hidden: int = 512,
    ffn: int = 1408,
    experts: int = 4,
    rows: int = 512,
    dtype: str = "",
    repeats: int = 7,
) -> dict[str, Any]:
    """Time every way that this machine can run.

    Args:
        hidden: H. For the real shape on an H100: --hidden 2048 --ffn 5504 --experts 4 --rows 2048.
        ffn: F.
        experts: L, experts of one group on a rank.
        rows: N, rows of each: capacity times expert-parallel ranks.
        dtype: fp32 or bf16; default: bf16 on CUDA, otherwise fp32.
        repeats: timed rounds, after one that warms up (and compiles, and captures).

    Returns:
        `machine`, `torch`, `threads`, `clock` (wall on CUDA, processor time on hosts), `dtype`, `shape`, `repeats`; for
        every way and part (forward, training: forward and backward) `seconds`, `tflops` and `over_bmm` (time relative
        to plain bmm in the same round) as min, median and max; `fastest`: the way with the lowest median of training,
        without the floor.
    """
    dtype = dtype or ("bf16" if device.has_cuda() else "fp32")
    if dtype not in _DTYPES:
        raise UsageError(f"bench experts: no such dtype: {dtype}", remedy=f"it takes {', '.join(_DTYPES)}")
    sizes = {"hidden": hidden, "ffn": ffn, "experts": experts, "rows": rows, "repeats": repeats}
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UsageError(f"bench experts: --{name} = {size} is not a positive number", remedy="give at least 1")
    shape = ExpertShape(experts, rows, hidden, ffn)
    device.keep_host_memory()
    given = inputs(shape, _DTYPES[dtype])
    contenders = ways(shape, _DTYPES[dtype])
    rounds = [{name: _time(way, given) for name, way in contenders.items()} for _ in range(repeats + 1)][1:]
    result: dict[str, Any] = {
        "machine": device.device_name(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "clock": "wall" if device.has_cuda() else "processor",
        "dtype": dtype,
        "shape": {"experts": experts, "rows": rows, "hidden": hidden, "ffn": ffn},
        "repeats": repeats,
        "ways": {name: {part: _figures(rounds, name, part, shape) for part in _PARTS} for name in contenders},
    }
    medians = {name: found["training"]["seconds"]["median"] for name, found in result["ways"].items() if name != FLOOR}
    result["fastest"] = min(medians, key=lambda name: medians[name])
    return result


def inputs(shape: ExpertShape, dtype: torch.dtype, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens [L, N, H] and weights [L, H, 2, F], [L, F, H] that preserve the scale; all require gradients."""
    generator = torch.Generator(device.taken()).manual_seed(seed)

    def draw(*size: int, scale: float) -> Tensor:
        values = torch.randn(size, generator=generator, device=device.taken()) * scale
        return values.to(dtype).requires_grad_()

    return (
        draw(shape.experts, shape.rows, shape.hidden, scale=1.0),
        draw(shape.experts, shape.hidden, 2, shape.ffn, scale=shape.hidden**-0.5),
        draw(shape.experts, shape.ffn, shape.hidden, scale=shape.ffn**-0.5),
    )


def _time(way: Way, given: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
    calls = _QUEUED_CALLS if device.has_cuda() else 1

    @torch.no_grad()
    def forward() -> None:
        way(*given)

    def training() -> None:
        output = way(*given)
        torch.autograd.grad(output, given, output.detach())

    # On a host the processor time of this process, which does not include the load of other processes.
    clock = time.perf_counter if device.has_cuda() else time.process_time
    seconds = {}
    for name, work in (("forward", forward), ("training", training)):
        device.synchronize()
        begun = clock()
        for _ in range(calls):
            work()
        device.synchronize()
        seconds[name] = (clock() - begun) / calls
    return seconds


def _figures(
    rounds: Sequence[Mapping[str, Mapping[str, float]]], name: str, part: str, shape: ExpertShape
) -> dict[str, dict[str, float]]:
    seconds = [times[name][part] for times in rounds]
    flops = shape.flops * (3 if part == "training" else 1)
    return {
        "seconds": _spread(seconds),
        "tflops": _spread([flops / second / 1e12 for second in seconds]),
        "over_bmm": _spread([times[name][part] / times[BASE][part] for times in rounds]),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def render(result: dict[str, Any]) -> str:
    """The result of `run` as a table for people."""
    shape = result["shape"]

    def triple(values: Mapping[str, float], scale: float, digits: int) -> str:
        return " / ".join(f"{values[key] * scale:.{digits}f}" for key in ("min", "median", "max"))

    lines = [
        f"{result['machine']}, {result['threads']} thread(s), torch {result['torch']}, {result['dtype']}; "
        f"{shape['experts']} experts x {shape['rows']} rows, hidden {shape['hidden']}, ffn {shape['ffn']}, "
        f"{result['repeats']} rounds; {result['clock']} time, min / median / max",
        "",
        "| way | forward, ms | with backward, ms | TFLOP/s with backward | time over bmm, forward | with backward |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in result["ways"].items():
        cells = [
            name,
            triple(found["forward"]["seconds"], 1e3, 2),
            triple(found["training"]["seconds"], 1e3, 2),
            triple(found["training"]["tflops"], 1.0, 3),
            triple(found["forward"]["over_bmm"], 1.0, 3),
            triple(found["training"]["over_bmm"], 1.0, 3),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"fastest with backward: {result['fastest']}"])
