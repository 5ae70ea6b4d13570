"""The values of one tensor, or a box of it, in a checkpoint or an archive: a list if there are few, and a summary.

Of an archive only the chunks that overlap the box are read.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.moments import decoded
from checkpoints_tools.sources import open_source
from mmscale.checkpoint.tensors import TensorSource, unknown_tensor
from mmscale.errors import CheckpointError, UsageError

MOST = 256  # values that are listed
_PIECE = 1 << 20  # elements that are summed up at once, in fp64


def values(path: Path, *, name: str, step: int | None = None, box: str = "") -> dict[str, Any]:
    """Values of a tensor.

    Args:
        path: a run's folder or an archive.
        name: the tensor; parts of the name may be omitted if only one tensor matches.
        step: the checkpoint; None: the newest.
        box: one index or range per dimension, e.g. "0,3:7"; dimensions at the end may be omitted.

    Returns:
        `name`, `shape`, `dtype`, `slice`, `selected` (shape of the box), `values` (None if there are more than 256);
        `min`, `max`, `mean`, `std`, `norm`, `zeros` of the finite values, and `not_finite`.

    Raises:
        CheckpointError: there is no such checkpoint or tensor, or its data are damaged.
        UsageError: the box does not fit the tensor.
    """
    source = decoded(open_source(path, step))
    full = find(source, name)
    entry = source.entry(full)
    region, dropped = parse_box(box, entry.shape)
    found = source.read(full, region if box else None)
    selected = [size for dimension, size in enumerate(found.shape) if dimension not in dropped]
    tensor = found.reshape(selected)
    return {
        "path": str(source.path),
        "step": source.step,
        "name": full,
        "shape": list(entry.shape),
        "dtype": str(entry.dtype).removeprefix("torch."),
        "slice": box,
        "selected": selected,
        "values": tensor.tolist() if tensor.numel() <= MOST else None,
        **summarize(tensor),
    }


def find(source: TensorSource, name: str) -> str:
    """The full name of a tensor: an exact match, or the only one with these parts in this order and the same last part.

    `decoder.layers.3.experts.image.w1` is `decoder.layers.3.mlp.experts.image.w1`. Weights are preferred to optimizer
    state.

    Raises:
        CheckpointError: none matches, or several do.
    """
    everything = source.names()
    if name in everything:
        return name
    for names in (source.names(weights=True), everything):
        fitting = [full for full in names if _abbreviates(name.split("."), full.split("."))]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            shown = ", ".join(fitting[:4]) + (", ..." if len(fitting) > 4 else "")
            raise CheckpointError(f"{name} fits {len(fitting)} tensors: {shown}", remedy="write more of the name")
    raise unknown_tensor(name, everything, where=source.path)


def _abbreviates(parts: list[str], full: list[str]) -> bool:
    rest = iter(full)
    return parts[-1] == full[-1] and all(part in rest for part in parts)


def parse_box(text: str, shape: tuple[int, ...]) -> tuple[list[slice], set[int]]:
    """`0,3:7` as slices of every dimension, and the dimensions that an index removes.

    Raises:
        UsageError: it is not a box, or not one of this shape.
    """
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    said = "x".join(map(str, shape)) or "scalar"
    if len(parts) > len(shape):
        raise UsageError(
            f"--slice {text} has {len(parts)} dimensions, the tensor is {said}", remedy="name fewer dimensions"
        )
    region, dropped = [slice(0, size) for size in shape], set()
    for dimension, part in enumerate(parts):
        start, colon, stop = part.partition(":")
        size = shape[dimension]
        try:
            if colon:
                begin, end, _ = slice(int(start) if start else None, int(stop) if stop else None).indices(size)
                region[dimension] = slice(begin, max(begin, end))
                continue
            index = int(start)
        except ValueError:
            raise UsageError(
                f"--slice {text}: {part!r} is neither an index nor a range", remedy="write e.g. 0 or 0,3:7 or :,0"
            ) from None
        if not -size <= index < size:
            raise UsageError(
                f"--slice {text}: index {index} is outside of dimension {dimension}, which has {size}",
                remedy=f"the tensor is {said}",
            )
        region[dimension] = slice(index % size, index % size + 1)
        dropped.add(dimension)
    return region, dropped


def summarize(tensor: Tensor) -> dict[str, Any]:
    """Minimum, maximum, mean, population standard deviation and L2 norm, summed in fp64; zeros; not finite ones."""
    flat = tensor.reshape(-1)
    number, zeros = 0, 0
    total = squares = 0.0
    low, high = math.inf, -math.inf
    for piece in flat.split(_PIECE):
        numbers = piece.double()
        numbers = numbers[torch.isfinite(numbers)]
        number += numbers.numel()
        zeros += int((numbers == 0).sum())
        if numbers.numel():
            total += float(numbers.sum())
            squares += float(numbers.square().sum())
            low, high = min(low, float(numbers.min())), max(high, float(numbers.max()))
    found: dict[str, Any] = {"zeros": zeros, "not_finite": flat.numel() - number}
    if not number:
        return dict.fromkeys(("min", "max", "mean", "std", "norm")) | found
    mean = total / number
    # Two passes, because a difference of large sums would lose the precision of the deviation.
    apart = sum(_squared_distance(piece, mean) for piece in flat.split(_PIECE))
    return {
        "min": low,
        "max": high,
        "mean": mean,
        "std": math.sqrt(apart / number),
        "norm": math.sqrt(squares),
        **found,
    }


def _squared_distance(piece: Tensor, mean: float) -> float:
    numbers = piece.double()
    return float((numbers[torch.isfinite(numbers)] - mean).square().sum())
