"""Initial weights that do not depend on the parallel layout.

Every parameter is drawn as a global tensor from a generator seeded by (seed, key, block of rows). A rank draws the
blocks that its shard overlaps and keeps its part, so the ranks of every layout agree with each other and with one
process. This works for any module with a correct sharded_state_dict, and it also tests that sharded_state_dict.
"""

from __future__ import annotations

import hashlib
import math
import re

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from mmscale.model.norm import norm_weights

_BIASES = ".linear_qkv.bias"  # start at zero
# Projections back into the residual stream start smaller, as in GPT-2 and megatron-core's scaled_init_method_normal.
# The last part of a linear's key is `weight`, or a modality's name.
_OUTPUT_PROJECTION = re.compile(r"\.(linear_proj|linear_fc2)\.[^.]+$|\.w2$")
# Elements of one independently drawn block; bounds the memory needed to initialise a large tensor.
_BLOCK_ELEMENTS = 1 << 22


def initialize(model: MegatronModule, *, seed: int, std: float, num_layers: int) -> None:
    """Fill all parameters of a model chunk; norm weights stay at one, biases are zero.

    Args:
        model: a megatron-core model, before it is wrapped in Float16Module or DDP.
        seed: run.seed.
        std: standard deviation; projections into the residual stream take std / sqrt(2 * num_layers).
        num_layers: layers of the whole model.
    """
    norms = {weight.untyped_storage().data_ptr() for weight in norm_weights(model)}
    # Buffers (thresholds of routers) keep the initial values that their modules gave them.
    kept = {buffer.untyped_storage().data_ptr() for buffer in model.buffers()}
    drawn: set[int] = set()
    for entry in model.sharded_state_dict(metadata={"non_homogeneous_layers": True}).values():
        parts = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
        for part in _tensors(parts):
            assert part.data is not None
            storage = part.data.untyped_storage().data_ptr()
            if storage in norms | kept:
                continue
            scaled = _OUTPUT_PROJECTION.search(part.key)
            if part.key.endswith(_BIASES):
                part.data.detach().zero_()
            else:
                _fill(part, seed=seed, std=std / math.sqrt(2 * num_layers) if scaled else std)
            drawn.add(storage)
    for name, parameter in model.named_parameters():
        assert parameter.untyped_storage().data_ptr() in drawn | norms, f"{name} was not initialised"


def _tensors(entry: object) -> list[ShardedTensor]:
    if isinstance(entry, ShardedTensor):
        return [entry]
    if isinstance(entry, dict):
        entry = list(entry.values())
    return [part for item in entry for part in _tensors(item)] if isinstance(entry, list | tuple) else []


def _fill(part: ShardedTensor, *, seed: int, std: float) -> None:
    """Copy this rank's slice of the global tensor into `part.data`, which may be a view of the parameter."""
    assert part.data is not None
    offset, local = part.global_offset, part.local_shape
    shape = part.global_shape
    # With non_homogeneous_layers sharding prepends no axes (for the layers of a homogeneous block).
    assert len(shape) == part.data.dim(), part.key
    rows_per_block = max(1, _BLOCK_ELEMENTS // max(1, math.prod(shape[1:])))
    target = part.data.detach()
    first, last = offset[0], offset[0] + local[0]
    for start in range(first // rows_per_block * rows_per_block, last, rows_per_block):
        rows = min(rows_per_block, shape[0] - start)
        block = _draw((rows, *shape[1:]), key=f"{seed}/{part.key}/{start}", std=std)
        low, high = max(start, first), min(start + rows, last)
        inner = tuple(slice(o, o + n) for o, n in zip(offset[1:], local[1:], strict=True))
        target[low - first : high - first].copy_(block[(slice(low - start, high - start), *inner)])


def _draw(shape: tuple[int, ...], *, key: str, std: float) -> Tensor:
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1)
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
