"""A run goes on from an archive as it goes on from its checkpoint: under another layout, with the same losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints_tools.diff import diff
from mmscale.checkpoint import archive, rewrite
from mmscale.checkpoint.arrays import Grid
from mmscale.checkpoint.tensors import open_tensors, origin_of
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from tests.distributed.test_resume import leg, settings, start
from tests.support import run_ranks

SAVED, DONE = 1, 3


def _leg(folder: Path, world_size: int, parallel: dict[str, Any], *, load: int | None, until: int, dtype: str) -> Any:
    """Losses and norms of some steps by forked ranks."""
    file = folder.with_suffix(".losses")

    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        made = settings("moma_depth", dtype=dtype, parallel=parallel)
        taken = leg(made, folder, load=load, until=until)
        if ranks.rank == 0:
            file.write_text(json.dumps([taken.losses, taken.norms]))
        process_groups.finalize()

    run_ranks(ranks_do, world_size=world_size, timeout_s=240)
    return json.loads(file.read_text())


@pytest.mark.parametrize(
    ("dtype", "before", "after"),
    [
        ("fp32", (4, {"tp": 2}), (4, {"pp": 2, "ep": 2})),
        ("bf16", (1, {}), (2, {"ep": 2})),
    ],
)
def test_losses_after_a_restore(
    tmp_path: Path, dtype: str, before: tuple[int, dict[str, Any]], after: tuple[int, dict[str, Any]]
) -> None:
    """Resumed from the restored archive, and from the checkpoint itself, under a layout that did not write it."""
    run, out, restored = tmp_path / "run", tmp_path / "archive", tmp_path / "restored"
    _leg(run, *before, load=None, until=SAVED, dtype=dtype)
    # Small chunks and pieces, so that tensors have several.
    manifest = archive.write(open_tensors(run), out, grid=Grid(chunk_bytes=1024, shard_bytes=8192))
    kept = archive.ArchiveTensors(out)
    rewrite.into_run(kept, restored, origin=origin_of("restore", [kept]), files=3, piece_bytes=4096)
    assert manifest.step == SAVED and manifest.origin is not None
    for other in (out, restored):
        found = diff((run, SAVED), (other, None))
        assert found["equal"] and len(found["tensors"]) > 100
        assert any(row["name"].startswith("optimizer.state.exp_avg_sq.decoder") for row in found["tensors"])
    direct = _leg(run, *after, load=SAVED, until=DONE, dtype=dtype)
    again = _leg(restored, *after, load=SAVED, until=DONE, dtype=dtype)
    assert len(direct[0]) == DONE - SAVED
    assert again == direct  # one layout, one state: bit for bit
    assert diff((run, DONE), (restored, DONE))["equal"]
