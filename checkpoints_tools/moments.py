"""Adam's moments as fp32 values, whatever format a checkpoint stores: for commands that compare, print or change them.

Commands that copy a checkpoint do not use this; they copy bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmscale.checkpoint.integrity import CheckpointManifest
from mmscale.checkpoint.tensors import OPTIMIZER, Region, TensorEntry, TensorSource, is_weight, unknown_tensor
from mmscale.train.optim.adam_compact import MOMENTS, triples_of
from mmscale.train.optim.adam_moments import TRIPLE, unpack
from mmscale.train.optim.stored_moments import cells_in

_STATE = f"{OPTIMIZER}state."


def decoded(source: TensorSource) -> TensorSource:
    """A source whose moments are fp32, without scales; the same source if it has no FP8 moments."""
    scales = tuple(f"{_STATE}{triples_of(moment)}." for moment in MOMENTS)
    return DecodedMoments(source) if any(name.startswith(scales) for name in source.names()) else source


class DecodedMoments:
    """A `TensorSource` over another one, with its FP8 moments decoded.

    Args:
        source: has moments in FP8.
    """

    def __init__(self, source: TensorSource) -> None:
        self.path, self.step = source.path, source.step
        self._source = source
        there = set(source.names())
        self._scales = {
            f"{_STATE}{moment}.{name.removeprefix(prefix)}": name
            for moment in MOMENTS
            for name in there
            if name.startswith(prefix := f"{_STATE}{triples_of(moment)}.")
        }
        self._names = sorted(there - set(self._scales.values()))

    def names(self, *, weights: bool = False) -> list[str]:
        """Names of all tensors, sorted; `weights`: without the optimizer's."""
        return [name for name in self._names if is_weight(name) or not weights]

    def entry(self, name: str) -> TensorEntry:
        """Shape and type of a tensor."""
        if name not in self._names:
            raise unknown_tensor(name, self._names, where=self.path)
        found = self._source.entry(name)
        return TensorEntry(name, found.shape, torch.float32) if name in self._scales else found

    def read(self, name: str, region: Region | None = None) -> Tensor:
        """A tensor, or a box of it, on the host."""
        shape = self.entry(name).shape
        if name not in self._scales:
            return self._source.read(name, region)
        box = [slice(0, size) for size in shape] if region is None else list(region)
        scales = self._scales[name]
        cell, axis = cells_in(shape, self._source.entry(scales).shape)
        begin, end = box[axis].start, box[axis].stop
        first, last = begin // cell, -(-end // cell)
        codes = self._source.read(name, region)
        there = [*box[:axis], slice(first * TRIPLE, last * TRIPLE), *box[axis + 1 :]]
        triples = self._source.read(scales, there).unflatten(axis, (-1, TRIPLE)).movedim(axis + 1, -1)
        each = triples.repeat_interleave(cell, dim=axis).narrow(axis, begin - first * cell, end - begin)
        return unpack(codes.unsqueeze(-1), each).squeeze(-1)

    def info(self) -> dict[str, Any]:
        """The metadata stored next to the tensors."""
        return self._source.info()

    def manifest(self) -> CheckpointManifest:
        """The files and the origin of the checkpoint."""
        return self._source.manifest()

    def common(self) -> dict[str, Any]:
        """Counters and the optimizer's settings."""
        return self._source.common()

    def objects(self) -> dict[str, bytes]:
        """Serialized objects by name."""
        return self._source.objects()
