"""Order of kernel launches and user buffers: what is set, left alone and refused. What overlaps needs GPUs."""

from __future__ import annotations

import logging

import pytest
import torch

from mmscale.errors import ConfigError
from mmscale.runtime import launch_order
from mmscale.runtime.launch_order import QUEUES


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("cuda")
def test_tensor_parallelism_gets_one_queue() -> None:
    environ: dict[str, str] = {}
    assert launch_order.one_queue(tp=2, environ=environ)
    assert environ == {QUEUES: "1"}


@pytest.mark.usefixtures("cuda")
def test_what_somebody_has_set_stays_and_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    environ = {QUEUES: "8"}
    with caplog.at_level(logging.WARNING):
        assert not launch_order.one_queue(tp=4, environ=environ)
    assert environ == {QUEUES: "8"}
    assert f"{QUEUES}=8" in caplog.text and "parallel.tp = 4" in caplog.text


@pytest.mark.usefixtures("cuda")
def test_without_tensor_parallelism_it_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    environ = {QUEUES: "8"}
    assert not launch_order.one_queue(tp=1, environ=environ)
    assert environ == {QUEUES: "8"} and not caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="about hosts without CUDA")
def test_hosts() -> None:
    environ: dict[str, str] = {}
    assert not launch_order.one_queue(tp=2, environ=environ)
    assert not environ
    with pytest.raises(ConfigError, match=r"parallel\.overlap_tensor = true needs Transformer-Engine"):
        launch_order.user_buffers(rows=8, hidden=16, tp=2, fp8=False)
