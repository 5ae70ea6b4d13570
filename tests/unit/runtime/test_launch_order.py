"""Order of kernel launches and user buffers: what is set, left alone and refused. What overlaps needs GPUs."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch

from mmscale.errors import ConfigError
from mmscale.runtime import launch_order
from mmscale.runtime.launch_order import QUEUES
from mmscale.runtime.rank_env import RankEnv
from mmscale.train import assembly
from tests.distributed.layouts import config
from tests.support import run_ranks


def test_tensor_parallelism_gets_one_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(QUEUES, "")
    monkeypatch.delenv(QUEUES)
    launch_order.one_queue(tp=2)
    assert os.environ[QUEUES] == "1"


def test_a_run_sets_it_before_it_asks_for_a_device() -> None:
    def begin(ranks: RankEnv) -> None:
        found: list[str | None] = []

        def is_available() -> bool:
            found.append(os.environ.get(QUEUES))
            return False

        os.environ.pop(QUEUES, None)
        torch.cuda.is_available = is_available
        with pytest.raises(ConfigError, match="world size"):  # one rank: it ends where groups would be made
            assembly.start(config("dense", parallel={"tp": 2}), ranks)
        assert found and set(found) == {"1"}

    run_ranks(begin, world_size=1)


def test_what_somebody_has_set_stays_and_is_warned_of(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(QUEUES, "8")
    with caplog.at_level(logging.WARNING):
        launch_order.one_queue(tp=4)
    assert os.environ[QUEUES] == "8"
    assert f"{QUEUES}=8" in caplog.text and "parallel.tp = 4" in caplog.text


def test_without_tensor_parallelism_it_is_left_alone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in ("8", None):
        monkeypatch.setenv(QUEUES, number) if number else monkeypatch.delenv(QUEUES)
        launch_order.one_queue(tp=1)
        assert os.environ.get(QUEUES) == number and not caplog.text
    for profile in (Path(__file__).parents[3] / "configs" / "cluster").glob("*.yaml"):
        assert QUEUES not in profile.read_text(), f"{profile.name} would set it for every layout"


@pytest.mark.skipif(torch.cuda.is_available(), reason="about hosts without CUDA")
def test_hosts() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.overlap_tensor = true needs Transformer-Engine"):
        launch_order.user_buffers(rows=8, hidden=16, tp=2, fp8=False, bf16=True)
