# mmscale/bench/checkpoint.py: the comparison that docs/saves.md quotes, on a tiny state; no assertion on time.
"""Tests of the checkpoint benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmscale.bench.checkpoint import measure, model_of, render, run
from mmscale.errors import UsageError
from mmscale.plan import count_parameters
from mmscale.runtime import groups
from mmscale.runtime.rank_env import RankEnv
from tests.support import run_ranks

# Without megatron-core's asynchronous way: it starts a process that a forked rank leaves behind.
TESTED = ("sync", "async", "megatron", "torch_async")


@pytest.mark.parametrize("gigabytes", [0.05, 1.0, 2.0])
def test_the_state_has_the_size_that_was_asked_for(gigabytes: float) -> None:
    assert 14 * count_parameters(model_of(gigabytes)).total == pytest.approx(gigabytes * 1e9, rel=0.05)


@pytest.mark.long
def test_every_way_saves_the_same_state(tmp_path: Path) -> None:
    def ranks_do(ranks: RankEnv) -> None:
        groups.initialize(ranks, seed=1)
        folder = tmp_path / "written"
        result = measure(model_of(0.005), ranks, folder=folder, repeats=1, ways=TESTED, archives=True)
        if ranks.rank == 0:
            (tmp_path / "result.json").write_text(json.dumps(result))
        groups.finalize()

    run_ranks(ranks_do, world_size=2)
    result = json.loads((tmp_path / "result.json").read_text())
    assert tuple(result["saves"]) == TESTED and result["ranks"] == 2
    for times in result["saves"].values():
        assert 0 < times["blocked_ms"]["median"] <= times["total_ms"]["median"]
    assert result["state_bytes"] == pytest.approx(14 * result["parameters"], rel=0.1)
    assert {"async_blocked_over_sync", "async_total_over_megatron", "async_blocked_over_torch_async"} <= set(
        result["ratios"]
    )
    assert 0 <= result["integrity_share"]["median"] < 1
    assert min(*result["step_s"].values(), result["verify_s"], result["load_s"], *result["archive"].values()) > 0
    shown = render(result)
    assert "| mmscale, async |" in shown and "torch async_save" in shown and "megatron-core, async" not in shown


def test_a_way_that_does_not_exist() -> None:
    with pytest.raises(UsageError, match="no way to save is called fast") as raised:
        run(ways="fast")
    assert "torch_async" in raised.value.remedy
