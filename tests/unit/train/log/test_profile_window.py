"""A window of recorded steps on some ranks: the pause for writing is one on all of them."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mmscale.config.log.schema import ProfileConfig
from mmscale.runtime import groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.log.profile_window import ProfileWindow
from mmscale.train.throughput import Throughput
from tests.distributed.layouts import config
from tests.support import distributed

WRITING_S = 0.5


@distributed(world_size=2)
def test_rank_0_waits_for_another_ranks_write(ranks: RankEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups.start(ranks)
    plain = config("dense")
    recorded = plain.model_copy(
        update={"log": plain.log.model_copy(update={"profile": ProfileConfig(start=2, steps=1, ranks=(1,))})}
    )
    monkeypatch.setattr(ProfileWindow, "_write", lambda self, first, last: time.sleep(WRITING_S))
    monkeypatch.setattr(ProfileWindow, "_begin", lambda self, step: setattr(self, "_first", step))
    beats: list[float] = []
    told: list[dict[str, Any]] = []
    clock = Throughput()
    window = ProfileWindow(
        recorded,
        folder=tmp_path,
        attempt=1,
        rank=ranks.rank,
        next_step=1,
        clock=clock,
        on_event=lambda event, **fields: told.append(fields),
        beat=lambda: beats.append(time.monotonic()),
    )
    with window:
        for step in range(1, 4):
            clock.step(10)
            window.on_step(cast(Any, None), cast(Any, SimpleNamespace(step=step)))
            assert clock.unread().get("profile_s", 0.0) >= (0.8 * WRITING_S if step >= 2 else 0.0)
    assert len(beats) == 2 and [fields["step"] for fields in told] == [2]
    values = clock.read()
    assert values["step_time_s"] * 3 < values["profile_s"]  # the write is a pause, not a part of the steps
    groups.finalize()
