"""Figures of a machine that `mmscale bench calibrate` measured, for `mmscale plan --gpu FILE.json`."""

from __future__ import annotations

import math
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmscale import bounded
from mmscale.errors import UsageError
from mmscale.tables.gpus import Efficiency, Gpu, gpu_named

FORMAT = 1
_SUFFIX = ".json"
_MOST_BYTES = 1 << 22
_SPEEDS = ("memory", "bf16", "fp32", "bandwidth", "link", "network", "per_node")
_SHARES = ("products", "attention", "attention_te", "memory", "link", "network")


def figures_of(name: str) -> Gpu:
    """A device by the name that `--gpu` takes: one of the table, or a file of `mmscale bench calibrate`.

    Raises:
        UsageError: no such name or file, or the file is another one.
    """
    return read(Path(name)) if name.endswith(_SUFFIX) else gpu_named(name)


def as_dict(gpu: Gpu) -> dict[str, Any]:
    """A device as plain data, which `of_dict` reads."""
    return {"format": FORMAT, "device": asdict(gpu)}


def read(file: Path) -> Gpu:
    """The device that a file describes.

    Raises:
        UsageError: there is no such file, or it is none of `mmscale bench calibrate`.
    """
    remedy = f"write it with `mmscale bench calibrate --out {shlex.quote(str(file))}`"
    try:
        found = bounded.read_object(file, most=_MOST_BYTES)
    except FileNotFoundError:
        raise UsageError(f"--gpu {file}: no such file", remedy=remedy) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"--gpu {file}: {error}", remedy=remedy) from error
    if found.get("format") != FORMAT:
        raise UsageError(f"--gpu {file} has format {found.get('format')}, this version reads {FORMAT}", remedy=remedy)
    try:
        return of_dict(found["device"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"--gpu {file} does not describe a device: {error!r}", remedy=remedy) from error


def of_dict(values: dict[str, Any]) -> Gpu:
    """A device from plain data.

    Raises:
        TypeError, ValueError: the data is something else.
    """
    reached: dict[str, Any] = dict(values["efficiency"])
    reached["latency"] = tuple(map(float, reached["latency"]))
    if len(reached["latency"]) != 2:
        raise ValueError("latency is two numbers")
    gpu = Gpu(**(values | {"efficiency": Efficiency(**reached)}))
    # Times are divided by these.
    speeds = [getattr(gpu, name) for name in _SPEEDS] + [reached[name] for name in _SHARES]
    speeds += [] if gpu.fp8 is None else [gpu.fp8]
    costs = [float(value) for key, value in reached.items() if key not in _SHARES and key != "latency"]
    if not all(map(math.isfinite, (*speeds, *costs, *reached["latency"]))):
        raise ValueError("a number is not finite")
    if min(speeds) <= 0 or min(*costs, *reached["latency"]) < 0:
        raise ValueError("a speed is not positive, or a cost is negative")
    if gpu.per_node != int(gpu.per_node):
        raise ValueError("per_node is no whole number")
    return gpu
