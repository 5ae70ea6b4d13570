"""Averages the weights of several checkpoints: uniformly, or as an exponential moving average.

The result has weights and the newest checkpoint's counters. It has no optimizer state, whose mean would be meaningless.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.alike import check_models
from checkpoints_tools.refusals import ONE_MODEL, check_average
from checkpoints_tools.sources import open_source, summary
from mmscale.checkpoint import rewrite
from mmscale.checkpoint.integrity import CheckpointManifest
from mmscale.checkpoint.tensors import OPTIMIZER, Region, TensorEntry, TensorSource, origin_of
from mmscale.errors import CheckpointError
from mmscale.runtime.environment import code_version
from mmscale.train.learned_data import made_from

_MASTER = f"{OPTIMIZER}state.param."  # the optimizer's fp32 copy of a weight


def average(checkpoints: Sequence[tuple[Path, int | None]], out: Path, *, ema: float | None = None) -> dict[str, Any]:
    """Write the mean of some checkpoints as the checkpoint of a new run.

    Args:
        checkpoints: run folders (or archives) and steps, at least two; with `ema` the oldest first.
        out: the folder of the new run.
        ema: decay of an exponential moving average that starts at the first one; None: all have the same weight.

    Returns:
        A summary of the new checkpoint, and `coefficients`, the weight of each checkpoint.

    Raises:
        UsageError: fewer than two checkpoints, or a decay outside of 0..1.
        CheckpointError: one is missing or damaged, they are of different models, or `out` has checkpoints.
    """
    counts = check_average(checkpoints, out, ema=ema)
    mean = Mean([open_source(path, step) for path, step in checkpoints], counts)
    settings: dict[str, Any] = {"coefficients": counts} | ({} if ema is None else {"ema": ema})
    origin = origin_of("average", mean.sources, **settings)
    made = rewrite.into_run(mean, out, origin=origin, weights=True, code_version=code_version())
    return summary(made) | {"coefficients": counts}


class Mean:
    """The mean of some sources' weights (a `TensorSource`), computed as it is read.

    Where all of them have the optimizer's fp32 weights, those are averaged and rounded once.

    Args:
        sources: of one model.
        counts: what each of them counts.

    Raises:
        CheckpointError: vocabularies, settings of the model, names, shapes or types differ.
    """

    def __init__(self, sources: Sequence[TensorSource], counts: Sequence[float]) -> None:
        self.sources = sources
        self._counts = counts
        self._newest = max(sources, key=lambda source: source.step)
        self.path = self._newest.path
        self.step = self._newest.step
        for other in sources[1:]:
            check_alike(sources[0], other, remedy=ONE_MODEL)
        available = [set(source.names()) for source in sources]
        self._masters = {name for name in set.intersection(*available) if name.startswith(_MASTER)}

    def names(self, *, weights: bool = False) -> list[str]:
        """Names of the weights; there is nothing else."""
        return self.sources[0].names(weights=True)

    def entry(self, name: str) -> TensorEntry:
        """Shape and type of a tensor."""
        return self.sources[0].entry(name)

    def read(self, name: str, region: Region | None = None) -> Tensor:
        """The mean of a tensor, computed in fp32 (fp64 for fp64), in the type of the weights."""
        entry = self.entry(name)
        source_name = f"{_MASTER}{name}" if f"{_MASTER}{name}" in self._masters else name
        if not entry.dtype.is_floating_point:
            return self._newest.read(name, region)
        total: Tensor | None = None
        for source, count in zip(self.sources, self._counts, strict=True):
            value = source.read(source_name, region)
            value = value.to(torch.promote_types(torch.float32, value.dtype))
            total = value.mul_(count) if total is None else total.add_(value, alpha=count)
        assert total is not None
        return total.to(entry.dtype)

    def info(self) -> dict[str, Any]:
        """The metadata of the newest checkpoint, and what the others were trained on."""
        newest = self._newest.info()
        return newest | made_from(*(source.info() for source in self.sources), newest=newest)

    def manifest(self) -> CheckpointManifest:
        """The newest checkpoint's manifest."""
        return self._newest.manifest()

    def common(self) -> dict[str, Any]:
        """The newest checkpoint's counters."""
        return self._newest.common()

    def objects(self) -> dict[str, bytes]:
        """The newest checkpoint's objects."""
        return self._newest.objects()


def check_alike(one: TensorSource, other: TensorSource, *, remedy: str) -> None:
    """Refuse two sources that are not of one model.

    Args:
        one: a source.
        other: another one.
        remedy: of the error.

    Raises:
        CheckpointError: vocabularies, settings of the model, names, shapes or types differ.
    """
    check_models(one, other, remedy=remedy)
    names = set(one.names(weights=True)) ^ set(other.names(weights=True))
    if names:
        raise CheckpointError(
            f"{one.path} and {other.path} do not have the same tensors: {', '.join(sorted(names)[:3])}", remedy=remedy
        )
    for name in one.names(weights=True):
        first, second = one.entry(name), other.entry(name)
        if first != second:
            raise CheckpointError(
                f"{name} is {_reason_text(first)} in {one.path} and {_reason_text(second)} in {other.path}",
                remedy=remedy,
            )


def _reason_text(entry: TensorEntry) -> str:
    return f"{str(entry.dtype).removeprefix('torch.')} {'x'.join(map(str, entry.shape)) or 'scalar'}"
