"""A save leaves no process behind: megatron-core's own writer would, 270 MB a rank, even after a kill."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from mmscale.checkpoint import write
from mmscale.runtime import groups
from tests.support import Ranks, distributed


@distributed(world_size=2)
def test_a_save_leaves_no_process(ranks: Ranks, tmp_path: Path) -> None:
    groups.initialize(ranks)
    tensor = ShardedTensor.from_rank_offsets("a", torch.ones(4), (0, ranks.rank, 2))
    plan = write.Planner().plan({"a": tensor})
    write.write(plan, tmp_path / "saved", random=b"", extra={}, on_write=lambda *_: None)
    assert psutil.Process().children(recursive=True) == []
    assert (tmp_path / "saved" / "metadata.json").exists() or not ranks.is_first
    groups.finalize()
