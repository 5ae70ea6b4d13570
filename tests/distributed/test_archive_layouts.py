"""A run goes on from an archive as it goes on from its checkpoint: under another layout, with the same losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints_tools.average import average
from checkpoints_tools.diff import diff
from mmscale.checkpoint import archive, rewrite
from mmscale.checkpoint.tensors import open_tensors, origin_of
from mmscale.checkpoint.zarr_arrays import Grid
from mmscale.errors import CheckpointError
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from tests.distributed.test_resume import assert_weights_are_newest, largest_difference, leg, settings, start, tensors
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

    run_ranks(ranks_do, world_size=world_size, timeout_s=600)
    return json.loads(file.read_text())


@pytest.mark.long
@pytest.mark.parametrize(
    ("dtype", "before", "after"),
    [
        ("bf16", (2, {"tp": 2}), (2, {"ep": 2})),
        pytest.param("fp32", (4, {"tp": 2}), (4, {"pp": 2, "ep": 2}), marks=pytest.mark.exhaustive),
        pytest.param("bf16", (1, {}), (2, {"ep": 2}), marks=pytest.mark.exhaustive),
    ],
)
def test_losses_after_a_restore(
    tmp_path: Path, dtype: str, before: tuple[int, dict[str, Any]], after: tuple[int, dict[str, Any]]
) -> None:
    """Resumed from the restored archive, and from the checkpoint itself, under a layout that did not write it."""
    run, out, restored = tmp_path / "run", tmp_path / "archive", tmp_path / "restored"
    _leg(run, *before, load=None, until=SAVED, dtype=dtype)

    def through_the_archive(ranks: RankEnv) -> None:
        # In a fork, for tensorstore works in none of a process that has used it. Tensors have many chunks and pieces.
        archive.write(open_tensors(run), out, grid=Grid(chunk_bytes=1024, shard_bytes=1 << 15))
        kept = archive.ArchiveTensors(out)
        rewrite.PIECE_BYTES = 4096
        rewrite.into_run(kept, restored, origin=origin_of("restore", [kept]), files=3)
        for other in (out, restored):
            found = diff((run, SAVED), (other, None))
            assert found["equal"] and len(found["tensors"]) > 100
            assert any(row["name"].startswith("optimizer.state.exp_avg_sq.decoder") for row in found["tensors"])

    run_ranks(through_the_archive, world_size=1)
    direct = _leg(run, *after, load=SAVED, until=DONE, dtype=dtype)
    again = _leg(restored, *after, load=SAVED, until=DONE, dtype=dtype)
    assert len(direct[0]) == DONE - SAVED
    assert again == direct  # one layout, one state: bit for bit
    assert diff((run, DONE), (restored, DONE))["equal"]


@pytest.mark.long
def test_training_from_weights_only(tmp_path: Path) -> None:
    """A mean has no optimizer state: refused unless asked for, then the same loss with moments that begin anew."""
    run, mean = tmp_path / "run", tmp_path / "mean"
    _leg(run, 1, {}, load=None, until=SAVED, dtype="bf16")
    average([(run, SAVED), (run, SAVED)], mean)

    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        made = settings("moma_depth", dtype="bf16", parallel={"ep": 2})
        with pytest.raises(CheckpointError, match="lacks the optimizer's state") as raised:
            leg(made, mean, load=SAVED, until=SAVED + 1)
        assert "checkpoint.allow_missing=true" in raised.value.remedy
        events: list[str] = []
        taken = leg(
            made,
            mean,
            load=SAVED,
            until=SAVED + 1,
            allow_missing=True,
            on_event=lambda event, **fields: events.append(event),
        )
        assert ("optimizer_fresh" in events) == (ranks.rank == 0)
        direct = leg(made, run, load=SAVED, until=SAVED + 1)
        assert taken.losses == direct.losses and taken.norms == direct.norms  # of the weights before the update
        saved = tensors(mean, SAVED + 1)
        assert_weights_are_newest(saved)
        assert largest_difference(saved, tensors(run, SAVED + 1)) > 1e-3  # other moments
        process_groups.finalize()

    run_ranks(ranks_do, world_size=2, timeout_s=600)
