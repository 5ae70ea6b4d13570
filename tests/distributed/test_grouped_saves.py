"""`checkpoint.writers`: fewer files per checkpoint, and every byte comes back, in any layout and by every reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmscale.checkpoint import grouped, integrity
from mmscale.checkpoint.layout import Store
from mmscale.checkpoint.save_settings import SaveSettings
from mmscale.runtime import random_state
from mmscale.runtime.rank_env import RankEnv
from tests.distributed.test_damage import Weights, begin, manager
from tests.support import run_ranks

WORLD = 4
OWN = {"MANIFEST.json", "index.json", ".metadata", "common.pt", "metadata.json", "mmscale.json"}


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("ways", [(3, 2), (4, 1), (5, 8), (1, 2), (2, 2)], ids=str)
def test_neighbours_share_nearly_equally(ways: tuple[int, int]) -> None:
    ranks, parts = list(range(10, 10 + ways[0])), ways[1]
    found = grouped.split(ranks, parts)
    assert [rank for part in found for rank in part] == ranks and len(found) == min(parts, len(ranks))
    assert max(map(len, found)) - min(map(len, found)) <= 1


@pytest.mark.parametrize("asynchronous", [pytest.param(True, marks=pytest.mark.long), False])
def test_a_checkpoint_of_fewer_files_is_the_same(tmp_path: Path, asynchronous: bool) -> None:
    """With each number of writers; and it is read by ranks that write otherwise."""

    def ranks_do(ranks: RankEnv) -> None:
        begin(ranks)
        states: dict[int, Any] = {}
        for writers in (0, 1, 2, 3, 9):
            run = tmp_path / f"{asynchronous}{writers}"
            saves = SaveSettings(asynchronous=asynchronous, writers=writers)
            checkpoints, _ = manager(run, saves=saves)
            torch.manual_seed(100 * writers + ranks.rank)
            for step in (1, 2):
                states[writers] = random_state.capture()
                checkpoints.save(Weights(step, elements=100_000 + ranks.rank * 0), last=True)
            folder = Store.of_run(run).path(2)
            if ranks.rank == 0:
                groups = WORLD if writers in (0, 9) else writers
                assert len(files(folder)) == 2 * groups + len(OWN), files(folder)
                assert integrity.verify(folder, step=2) == []
            checkpoints.saver.close()
        for writers in (0, 1, 2, 3, 9):  # the settings of who reads are others
            again, told = manager(tmp_path / f"{asynchronous}{writers}", attempt=2)
            torch.manual_seed(0)
            state = Weights(0, elements=100_000)
            newest = again.choose()
            assert newest == 2
            again.load(state, newest)
            assert state.step == 2 and state.is_whole(), writers
            assert "random_state_fresh" not in [event for event, _ in told]
            assert torch.equal(random_state.capture()["torch"], states[writers]["torch"]), writers

    run_ranks(ranks_do, world_size=WORLD)


def test_a_rank_that_has_nothing_to_write_and_one_with_much(tmp_path: Path) -> None:
    def ranks_do(ranks: RankEnv) -> None:
        begin(ranks)
        checkpoints, _ = manager(tmp_path, saves=SaveSettings(writers=1))
        state = Uneven(5)
        checkpoints.save(state, last=True)
        again, _ = manager(tmp_path, attempt=2)
        read = Uneven(0)
        newest = again.choose()
        assert newest == 5
        again.load(read, newest)
        assert torch.equal(read.tensor, torch.arange(3_000_000.0) + 5)

    run_ranks(ranks_do, world_size=2)


class Uneven(Weights):
    """One tensor that both ranks hold, of which one writes all."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.tensor = torch.arange(3_000_000.0) + step

    def sharded(self, *, loading: bool) -> dict[str, Any]:
        from megatron.core.dist_checkpointing import ShardedTensor

        replica = torch.distributed.get_rank()
        state: dict[str, Any] = {"weight": ShardedTensor.from_rank_offsets("weight", self.tensor, replica_id=replica)}
        return state if loading else state | {"progress": {"step": self.step}}


def test_the_rank_that_failed_is_named() -> None:
    """By those that only heard of it, also through a third one."""
    heard = f"{grouped.ELSEWHERE}rank 3: No space left on device"
    assert grouped.origin(heard) == (3, "No space left on device")
    assert grouped.origin(f"{grouped.ELSEWHERE}rank 0: {heard}") == (3, "No space left on device")
    assert grouped.origin(f"{grouped.ELSEWHERE}rank 3 has ended") is None
    assert grouped.origin("No space left on device") is None
