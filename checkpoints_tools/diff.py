"""Compares two checkpoints tensor by tensor, with only one pair of tensors in memory at a time.

Compares complete tensors, whatever layout wrote them. One process, no process group.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from checkpoints_tools.moments import decoded
from checkpoints_tools.sources import open_source
from mmscale.checkpoint.tensors import TensorSource


def diff(one: tuple[Path, int | None], other: tuple[Path, int | None], *, weights: bool = False) -> dict[str, Any]:
    """Compare two intact checkpoints.

    Args:
        one: run folder and step, None for the newest; or an archive.
        other: the other checkpoint, likewise.
        weights: omit the optimizer's state.

    Returns:
        `tensors`: shape, `max_abs` and `max_rel` (relative to the largest element of `one`) of every tensor that both
        have in the same shape; `only_in_one`, `only_in_other`, `other_shape`: names; `max_abs`, `max_rel` over all;
        `equal`.

    Raises:
        CheckpointError: one of them does not exist or is damaged.
    """
    sources = [decoded(open_source(path, step)) for path, step in (one, other)]
    names = [{name: source.entry(name).shape for name in source.names(weights=weights)} for source in sources]
    rows, shapes = [], []
    for name in sorted(names[0].keys() & names[1].keys()):
        if names[0][name] != names[1][name]:
            shapes.append(name)
            continue
        rows.append({"name": name, "shape": list(names[0][name]), **_distance(name, *sources)})
    result: dict[str, Any] = {
        "one": str(sources[0].path),
        "other": str(sources[1].path),
        "only_in_one": sorted(names[0].keys() - names[1].keys()),
        "only_in_other": sorted(names[1].keys() - names[0].keys()),
        "other_shape": shapes,
        "max_abs": max((row["max_abs"] for row in rows), default=0.0),
        "max_rel": max((row["max_rel"] for row in rows), default=0.0),
        "tensors": rows,
    }
    same_names = not (shapes or result["only_in_one"] or result["only_in_other"])
    return {"equal": same_names and all(row["equal"] for row in rows), **result}


def _distance(name: str, one: TensorSource, other: TensorSource) -> dict[str, Any]:
    mine, theirs = one.read(name), other.read(name)
    equal = mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    if equal or mine.numel() == 0:
        return {"max_abs": 0.0, "max_rel": 0.0, "equal": equal}
    first = mine.double()
    apart = float((first - theirs.double()).abs().max())
    largest = float(first.abs().max())
    relative = apart / largest if largest > 0 else (0.0 if apart == 0 else float("inf"))
    return {"max_abs": apart, "max_rel": relative, "equal": False}
