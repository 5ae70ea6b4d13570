"""Measures this machine for the time model of `mmscale plan`, and checks its predictions against other steps.

Matrix products by shape, copies, and messages between ranks of this machine are timed alone. What else a step costs
(starting operations, attention, element-wise operations, the loss, the optimizer) is fitted to a dozen small steps by
non-negative least squares of relative errors: the time model is linear in these. `mmscale plan --gpu FILE` reads the
result.

    mmscale bench calibrate --out measured.json
    mmscale bench calibrate --others 1              # also predicts steps of other shapes
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmscale.bench import calibrate_messages as messages
from mmscale.bench.calibrate_steps import FITTED, PREDICTED, Shape, clock, config_of, seconds_of_steps
from mmscale.config import Config
from mmscale.errors import UsageError
from mmscale.plan import count_parameters
from mmscale.plan.measured import as_dict
from mmscale.plan.memory import GIB
from mmscale.plan.timing import step_time
from mmscale.runtime import device, groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.tables.gpus import Efficiency, Gpu

_ROWS = 1024
_SIDES = (64, 128, 256, 512, 1024)  # shortest sides of the products
_COPIED = 1 << 26  # elements of fp32
_NOTHING = 1e-12
# Times of steps that a fit cannot tell apart from zero.
_TERMS: dict[str, Callable[[float], dict[str, Any]]] = {
    "products": lambda seconds: {"products": 1 / seconds},
    "attention": lambda seconds: {"attention": 1 / seconds, "attention_te": 1 / seconds},
    "moves": lambda moves: {"moves": moves},
    "routed_moves": lambda moves: {"routed_moves": moves},
    "launch": lambda seconds: {"launch": seconds},
    "logits": lambda moved: {"logits": moved},
    "adam": lambda moved: {"adam": moved},
    "fixed": lambda seconds: {"fixed": seconds},
}
# The size of each term, so that the columns of the fit have similar magnitudes.
_UNITS = {
    "products": 1.0,
    "attention": 1.0,
    "moves": 1.0,
    "routed_moves": 1.0,
    "launch": 1e-6,
    "logits": 1.0,
    "adam": 1.0,
    "fixed": 1e-3,
}


def run(*, out: str = "", others: int = 0, nproc: int = 2, repeats: int = 5) -> dict[str, Any]:
    """Measure this machine.

    Args:
        out: file to write for `mmscale plan --gpu`; empty: none.
        others: 1: also time steps of ten other shapes, in the same rounds, and predict them.
        nproc: ranks between which messages are timed; 1: messages are not measured, and count as memory copies.
        repeats: timed steps of each shape, of which the shortest counts.

    Returns:
        `machine`, `torch`, `threads`, `device` (as in the file), `steps` (shape, `fitted`, `seconds`, `predicted`,
        `ratio`).

    Raises:
        UsageError: `out` cannot be written.
    """
    if out and not Path(out).parent.is_dir():
        raise UsageError(f"bench calibrate --out {out}: there is no folder {Path(out).parent}", remedy="create it")
    shapes = FITTED + (PREDICTED if others else ())
    gpu = alone(messages.measure(nproc) if nproc > 1 else None)
    with _one_rank():
        seconds = seconds_of_steps([config_of(shape) for shape in shapes], repeats=repeats)
    gpu = fitted(gpu, [config_of(shape) for shape in FITTED], seconds[: len(FITTED)])
    result = {
        "machine": device.device_name(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **as_dict(gpu),
        "steps": [_compared(gpu, shape, found) for shape, found in zip(shapes, seconds, strict=True)],
    }
    if out:
        Path(out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def alone(found: messages.Messages | None) -> Gpu:
    """This machine by products, copies and messages; everything else costs nothing yet."""
    peak, half = products()
    bandwidth = copies()
    found = found or messages.Messages(latency=0.0, bandwidth=bandwidth)
    nothing = Efficiency(
        products=1.0,
        half_width=half,
        attention=1 / _NOTHING,
        attention_te=1 / _NOTHING,
        memory=1.0,
        moves=_NOTHING,
        routed_moves=_NOTHING,
        logits=0.0,
        adam=0.0,
        launch=0.0,
        fixed=0.0,
        link=1.0,
        network=1.0,
        latency=(found.latency, found.latency),
    )
    return Gpu(
        name=device.device_name(),
        memory=device.memory_bytes() / GIB,
        bf16=peak,
        fp8=None,
        fp32=peak,
        bandwidth=bandwidth,
        link=found.bandwidth,
        network=found.bandwidth,
        per_node=device.processors(),
        source=f"measured with torch {torch.__version__}, {torch.get_num_threads()} threads",
        efficiency=nothing,
        host=not device.has_cuda(),
    )


def products() -> tuple[float, float]:
    """Peak of matrix products [FLOP/s], and the side at which a product reaches half of it."""
    dtype = torch.bfloat16 if device.has_cuda() else torch.float32
    rates = []
    for side in _SIDES:
        left = torch.randn(_ROWS, side, device=device.taken(), dtype=dtype)
        right = torch.randn(side, side, device=device.taken(), dtype=dtype)
        rates.append(2 * _ROWS * side * side / _shortest(functools.partial(torch.matmul, left, right)))
    return fit_rates(_SIDES, rates)


def fit_rates(sides: Sequence[int], rates: Sequence[float]) -> tuple[float, float]:
    """P and h of rate = P * side / (side + h), by least squares of relative errors of 1 / rate."""
    inverse = 1 / np.asarray(rates)
    columns = np.stack([np.ones(len(sides)), 1 / np.asarray(sides)], axis=1) / inverse[:, None]
    flat, slope = nonnegative(columns, np.ones(len(sides)))
    return 1 / max(flat, _NOTHING * float(inverse.min())), max(1.0, slope / flat) if flat else 1.0


def copies() -> float:
    """Bytes read and written per second by a copy that is larger than the caches."""
    source = torch.randn(_COPIED // (1 if device.has_cuda() else 4), device=device.taken())
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / _shortest(lambda: target.copy_(source))


def fitted(gpu: Gpu, configs: Sequence[Config], seconds: Sequence[float]) -> Gpu:
    """The device with the costs that explain the seconds of steps best.

    Args:
        gpu: the device by `alone`.
        configs: of the steps, one rank each.
        seconds: measured.
    """
    base = np.asarray([_predicted(without(gpu, "products"), config) for config in configs])
    columns = np.asarray(
        [
            [_predicted(_with(without(gpu, "products"), name, unit), config) - least for name, unit in _UNITS.items()]
            for config, least in zip(configs, base, strict=True)
        ]
    )
    measured = np.asarray(seconds)
    found = nonnegative(columns / measured[:, None], (measured - base) / measured)
    for name, value in zip(_UNITS, found, strict=True):
        gpu = _with(gpu, name, max(float(value), _NOTHING) * _UNITS[name])
    return gpu


def without(gpu: Gpu, name: str) -> Gpu:
    """The device on which one of the terms costs nothing."""
    return _with(gpu, name, _NOTHING * _UNITS[name])


def _with(gpu: Gpu, name: str, value: float) -> Gpu:
    efficiency = dataclasses.replace(gpu.efficiency, **_TERMS[name](value))
    return dataclasses.replace(gpu, efficiency=efficiency)


def nonnegative(columns: NDArray[Any], wanted: NDArray[Any]) -> NDArray[Any]:
    """Least squares with coefficients of at least zero: columns with a negative one are left out, one by one."""
    kept = list(range(columns.shape[1]))
    while kept:
        found, *_ = np.linalg.lstsq(columns[:, kept], wanted, rcond=None)
        if found.min() >= 0:
            break
        del kept[int(found.argmin())]
    result = np.zeros(columns.shape[1])
    if kept:
        result[kept] = found
    return result


def _predicted(gpu: Gpu, config: Config) -> float:
    return step_time(config, 1, gpu, parameters=count_parameters(config)).total


def _compared(gpu: Gpu, shape: Shape, seconds: float) -> dict[str, Any]:
    predicted = _predicted(gpu, config_of(shape))
    keys = ("kind", "layers", "width", "seq_length", "micro_batch", "ids")
    return dict(zip(keys, shape, strict=True)) | {
        "fitted": shape in FITTED,
        "seconds": round(seconds, 5),
        "predicted": round(predicted, 5),
        "ratio": round(predicted / seconds, 3),
    }


def _shortest(work: Callable[[], object], *, rounds: int = 7, least: float = 0.02) -> float:
    """Seconds of one call: the shortest of several rounds of at least `least` seconds."""
    work()
    device.synchronize()
    begin = clock()
    work()
    device.synchronize()
    calls = max(1, int(least / max(clock() - begin, 1e-7)))
    found = []
    for _ in range(rounds):
        begin = clock()
        for _ in range(calls):
            work()
        device.synchronize()
        found.append((clock() - begin) / calls)
    return min(found)


@contextmanager
def _one_rank() -> Iterator[None]:
    """Process groups of one rank."""
    device.keep_host_memory()
    own = not torch.distributed.is_initialized()
    if own:
        groups.initialize(RankEnv())
    try:
        yield
    finally:
        if own:
            groups.finalize()


def render(result: dict[str, Any]) -> str:
    """The result of `run` as tables for people."""
    found, reached = result["device"], result["device"]["efficiency"]
    lines = [
        f"{result['machine']}, {result['threads']} thread(s), torch {result['torch']}",
        f"products {found['fp32'] / 1e9:.1f} GFLOP/s, half of it with a side of {reached['half_width']:.0f}; copies "
        f"{found['bandwidth'] / 1e9:.1f} GB/s; messages "
        f"{found['link'] / 1e9:.2f} GB/s, {reached['latency'][0] * 1e6:.0f} us",
        f"an operation costs {reached['launch'] * 1e6:.1f} us, a step {reached['fixed'] * 1e3:.2f} ms besides",
        "",
        "| kind | layers | width | tokens x sequences | ids | fitted | step, ms | predicted, ms | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in result["steps"]:
        cells = (
            *(one[key] for key in ("kind", "layers", "width")),
            f"{one['seq_length']} x {one['micro_batch']}",
            one["ids"],
            "yes" if one["fitted"] else "no",
            *(f"{1e3 * one[key]:.1f}" for key in ("seconds", "predicted")),
            f"{one['ratio']:.2f}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
