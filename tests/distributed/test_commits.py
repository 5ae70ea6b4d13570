"""A commit that is killed, or that a rank cannot write, leaves the checkpoint before it whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from mmscale.checkpoint import integrity
from mmscale.checkpoint.layout import LATEST, Store
from mmscale.errors import SaveError
from mmscale.resilience.inject import VARIABLE, Faults
from mmscale.runtime import fail_points
from mmscale.runtime.rank_env import RankEnv
from tests.distributed.test_damage import Weights, begin, manager, on_first, save, zero
from tests.support import distributed, run_ranks

STAGES = ("write", "index", "manifest", "fsync", "move", "rename", "latest")


@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step"])
def test_killed_between_any_two_sub_steps_of_a_commit(tmp_path: Path, again: bool) -> None:
    """Rank 0 dies; the checkpoint before it or the new one is there, and whole."""

    def first(ranks: RankEnv) -> None:
        begin(ranks)
        save(tmp_path / "run", 1, *([2] if again else []))

    run_ranks(first, world_size=2)
    for stage in STAGES if again else [stage for stage in STAGES if stage != "move"]:
        run = tmp_path / stage
        shutil.copytree(tmp_path / "run", run)

        def dies(ranks: RankEnv, run: Path = run, stage: str = stage) -> None:
            begin(ranks)
            checkpoints, _ = manager(run, attempt=2)
            with fail_points.handled(lambda now: os._exit(9) if now == stage and ranks.rank == 0 else None):
                checkpoints.save(Weights(2))

        with pytest.raises(pytest.fail.Exception):
            run_ranks(dies, world_size=2)
        store = Store.of_run(run)
        store.sweep()
        newest = store.newest()
        assert newest is not None
        store.point_to_newest()
        assert integrity.verify(store.path(newest), step=newest) == [], stage
        old, new = (2 if again else 1, 1), (2, 2)
        found = (newest, integrity.read_manifest(store.path(newest)).attempt)
        assert found == (new if stage in ("rename", "latest") else old), stage
        assert integrity.verify(store.path(1), step=1) == []
        left = [LATEST, "step_00000001", "step_00000002"][: 3 if newest == 2 else 2]
        assert sorted(entry.name for entry in store.root.iterdir()) == left, stage


@distributed(world_size=2)
def test_a_rank_that_cannot_write_fails_the_save_on_all(ranks: RankEnv, tmp_path: Path) -> None:
    begin(ranks)
    save(tmp_path, 1)
    faults = Faults.of_rank(ranks.rank, {VARIABLE: "1:2:write:EIO"})
    checkpoints, _ = manager(tmp_path, attempt=2, on_point=faults.at)
    with pytest.raises(SaveError, match=r"rank 1: Input/output error") as raised:
        checkpoints.save(Weights(2), last=True)
    assert raised.value.exit_status == 74
    assert manager(tmp_path, attempt=3)[0].choose() == 1
    checkpoints.save(Weights(3))
    assert manager(tmp_path, attempt=3)[0].choose() == 3


@distributed(world_size=2)
def test_two_verified_checkpoints_remain(ranks: RankEnv, tmp_path: Path) -> None:
    """The newest is bad, and retention asks for one."""
    begin(ranks)
    store = save(tmp_path, 1, 2, 3, keep=1).store
    assert store.steps() == [2, 3]
    on_first(lambda: zero(store.path(3) / "__0_0.distcp"))
    checkpoints, _ = manager(tmp_path, attempt=2, keep=1)
    assert checkpoints.choose() == 2
    checkpoints.load(Weights(), 2)
    checkpoints.save(Weights(4))
    torch.distributed.barrier()
    assert store.steps() == [2, 4]
    checkpoints.save(Weights(5))
    assert store.steps() == [4, 5]
    assert checkpoints.verified >= {4, 5}
    save(tmp_path / "every", *range(1, 8), keep=1, keep_every=3)
    assert Store.of_run(tmp_path / "every").steps() == [3, 6, 7]
