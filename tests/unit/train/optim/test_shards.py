"""Flat ranges as boxes, by brute force; the optimizer's state saved where it lies, against megatron-core's gather."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from mmscale.checkpoint.manager import CheckpointManager
from mmscale.runtime import groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.assembly import build
from mmscale.train.optim.boxes import boxes
from mmscale.train.optim.shards import ShardwiseOptimizer
from mmscale.train.state.train_state import TrainState
from tests.distributed.test_resume import settings, start, tensors, train
from tests.support import run_ranks


@given(st.lists(st.integers(1, 4), max_size=4), st.integers(0, 300), st.integers(0, 300))
def test_boxes_are_the_range_in_order(shape: list[int], one: int, other: int) -> None:
    whole = torch.arange(math.prod(shape)).reshape(shape)
    start_at, end = sorted((min(one, whole.numel()), min(other, whole.numel())))
    found = list(boxes(shape, start_at, end))
    parts = [
        whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))].reshape(-1)
        for offsets, sizes in found
    ]
    flat = torch.cat(parts) if parts else whole.reshape(-1)[:0]
    assert torch.equal(flat, torch.arange(start_at, end))
    assert len(found) <= max(1, 2 * len(shape) - 1)


# SwiGLU's two halves under one key, uneven cuts, experts, interleaved stages; bf16 with master weights.
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("dense", "bf16", {}),
    ("moma_depth", "fp32", {"ep": 2}),
    ("moma_depth", "fp32", {"pp": 2, "vpp": 2}),
]


def test_what_is_saved_without_gathering_is_what_megatron_gathers(tmp_path: Path) -> None:
    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        for number, (model, dtype, parallel) in enumerate(CASES):
            made = settings(model, dtype=dtype, parallel=parallel)
            layout = made.parallel
            collection = groups.initialize_layout(
                tp=layout.tp, pp=layout.pp, vpp=layout.vpp, ep=layout.ep, seed=made.run.seed
            )
            parts = build(made, collection)
            state = TrainState(parts.chunks, parts.optimizer)
            train(made, parts, state, until=2)
            folders = tmp_path / f"{number}_shards", tmp_path / f"{number}_gathered"
            optimizers = getattr(parts.optimizer, "chained_optimizers", [parts.optimizer])
            assert {type(optimizer) for optimizer in optimizers} == {ShardwiseOptimizer}
            for folder in folders:
                CheckpointManager(folder, every=0, keep=9, attempt=1, info={}, on_event=_ignore_event).save(state)
                for optimizer in optimizers:
                    optimizer.__class__ = DistributedOptimizer
            shards, gathered = (tensors(folder, 2) for folder in folders)
            assert shards.keys() == gathered.keys()
            assert any(key.startswith("optimizer.state.exp_avg_sq") for key in shards)
            different = [key for key in shards if not torch.equal(shards[key], gathered[key])]
            assert not different, (model, dtype, parallel, different)
            assert all(shards[key].dtype == gathered[key].dtype for key in shards)
            groups.destroy_layout()
        groups.finalize()

    run_ranks(ranks_do, world_size=2)


def test_no_collective_sends_the_state(tmp_path: Path) -> None:
    """Gathering would be seen: the largest thing that a save sends is the plan."""

    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        made = settings("moma")
        parts = build(made, groups.initialize_layout(seed=made.run.seed))
        state = TrainState(parts.chunks, parts.optimizer)
        train(made, parts, state, until=1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.distributed, "all_gather", lambda *_, **__: pytest.fail("state is gathered"))
            sharded = state.sharded(loading=False)
        parameters = sum(p.numel() for chunk in parts.chunks for p in chunk.parameters())
        owned = sum(
            shard.data.numel()
            for key, shard in _shards(sharded["optimizer"])
            if key.startswith("optimizer.state.exp_avg.")
        )
        total = torch.tensor(owned)
        torch.distributed.all_reduce(total)
        assert owned < 0.6 * parameters and total.item() == parameters
        groups.destroy_layout()
        groups.finalize()

    run_ranks(ranks_do, world_size=2)


def _ignore_event(*event: object, **fields: object) -> None:
    """Nobody listens to the manager's events here."""


def _shards(entry: Any) -> list[tuple[str, Any]]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    return [(value.key, value) for value in nested_values(entry) if isinstance(value, ShardedTensor)]
