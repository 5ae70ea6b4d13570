"""Spikes of the loss: the step is left out or rolled back, within a budget, and the run is the same after kills."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mmscale.config import Config
from mmscale.errors import TrainingError
from mmscale.runtime import device
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.state.train_state import TrainState
from tests.distributed.test_anomalies import (
    BATCH,
    Life,
    build,
    changed,
    content,
    live,
    manager,
    with_policy,
)
from tests.distributed.test_resume import OVERLAPPED, settings, start
from tests.support import distributed, run_ranks

STEPS, SAVE, BAD = 13, 6, 9  # batch 9 is that of step 10; saves after 6, 12 and 13


def spiking(action: str, parallel: Mapping[str, Any], **anomaly: Any) -> Config:
    made = settings("moma_post_per_expert_shared", parallel=parallel)
    return changed(
        with_policy(made, steps=STEPS, every=SAVE, window=8, action=action, skip_window=5, **anomaly),
        "model",
        dropout=0.1,
    )


def unsaved(made: Config) -> Config:
    return changed(made, "checkpoint", every=0)


@dataclass
class Ended:
    """A run that ended, after as many restarts as it took."""

    life: Life
    content: dict[str, bytes]
    state: TrainState


def run_of(
    made: Config,
    folder: Path,
    *,
    bad: tuple[int, ...] = (BAD,),
    without: tuple[int, ...] = (),
    kills: tuple[int, ...] = (),
) -> Ended:
    """A run that is killed at some steps and started again from what is on disk, in new objects with other seeds."""
    whole = Life()
    for number, kill_at in enumerate((*kills, None)):
        parts, state = build(made)
        checkpoints = manager(made, folder)
        newest = checkpoints.choose()
        if number:
            device.set_seeds(999 + number)
        if newest is not None:
            checkpoints.load(state, newest)
        life = live(made, parts, state, bad=bad, without=without, folder=folder, kill_at=kill_at)
        whole.losses |= life.losses
        whole.norms |= life.norms
        whole.events += life.events
        whole.warnings += life.warnings
        ended = Ended(whole, content(parts), state)
        process_groups.destroy_layout()
    return ended


def assert_same(one: Ended, other: Ended) -> None:
    assert (one.life.losses, one.life.norms) == (other.life.losses, other.life.norms)
    assert one.content == other.content
    assert one.state.step == other.state.step


@pytest.mark.long
def test_a_spike_is_left_out_and_the_run_is_the_same_after_kills(tmp_path: Path) -> None:
    """Exactly the run in which the bad batch never was, killed before and after the checkpoint behind the skip."""

    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        made = spiking("skip", {"pp": 2})
        found = run_of(made, tmp_path / "found")
        assert found.life.names() == ["skip"], found.life.warnings
        assert found.life.events[0][1]["step"] == BAD + 1 and "grad_norm" in found.life.events[0][1]
        assert found.state.anomalies.skipped == [[BAD * BATCH, (BAD + 1) * BATCH]]
        never = run_of(unsaved(made), tmp_path / "never", without=(BAD,))
        assert never.life.names() == []
        assert_same(found, never)
        killed = run_of(made, tmp_path / "killed", kills=(11, 13))
        assert_same(killed, found)
        assert killed.state.anomalies == found.state.anomalies
        assert killed.state.sequences == found.state.sequences
        assert killed.life.names() == ["skip", "skip"]  # again after the first kill, and not after the second
        process_groups.finalize()

    run_ranks(ranks_do, world_size=2)


@pytest.mark.long
def test_a_spike_rolls_back_and_the_run_is_the_same_after_kills(tmp_path: Path) -> None:
    """Back to step 6, on behind batch 10: exactly the run in which batches 6 to 10 never were."""

    def ranks_do(ranks: RankEnv) -> None:
        start(ranks)
        made = spiking("rollback", {"ep": 2, **OVERLAPPED})
        found = run_of(made, tmp_path / "found")
        assert found.life.names() == ["rollback"], found.life.warnings
        event = found.life.events[0][1]
        assert (event["step"], event["to"], event["number"]) == (BAD + 1, SAVE, 1)
        assert event["sequences"] == [SAVE * BATCH, (SAVE + 5) * BATCH]
        assert found.state.anomalies.skipped == [[SAVE * BATCH, (SAVE + 5) * BATCH]]
        assert "back to the checkpoint of step 6" in found.life.warnings[0]
        never = run_of(unsaved(made), tmp_path / "never", without=(6, 7, 8, 9, 10))
        assert never.life.names() == []
        assert_same(found, never)
        killed = run_of(made, tmp_path / "killed", kills=(11, 13))
        assert_same(killed, found)
        assert killed.state.anomalies == found.state.anomalies
        assert killed.state.sequences == found.state.sequences
        process_groups.finalize()

    run_ranks(ranks_do, world_size=2)


@distributed(world_size=1)
def test_spikes_without_end_end_the_run(ranks: RankEnv, tmp_path: Path) -> None:
    """Every batch from number 9 on is bad: the budget bounds roll-backs. With no checkpoint yet a batch is left out."""
    start(ranks)
    bad = tuple(range(BAD, 100))
    made = spiking("rollback", {}, budget=2)
    with pytest.raises(TrainingError) as error:
        run_of(made, tmp_path / "endless", bad=bad)
    assert "budget of 2" in error.value.cause and "grad_norm" in error.value.cause
    process_groups.destroy_layout()
    early = run_of(unsaved(spiking("rollback", {})), tmp_path / "early")
    assert early.life.names() == ["skip"]
    assert "no checkpoint to go back to yet" in early.life.warnings[0]
    assert early.state.anomalies.skipped == [[BAD * BATCH, (BAD + 1) * BATCH]]
    # Only told: the batch is trained on.
    logged = run_of(unsaved(spiking("log", {})), tmp_path / "logged")
    assert logged.life.names() == ["spike"] and logged.state.sequences == STEPS * BATCH
    assert logged.state.anomalies.counts == {"spike": 1}
    process_groups.finalize()
