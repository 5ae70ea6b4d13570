"""A request to stop: noted by a handler that does nothing else, undone on leaving, agreed on by all ranks."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from mmscale.resilience.signals import StopRequest
from mmscale.runtime.rank_env import RankEnv
from tests.support import distributed

pytestmark = pytest.mark.usefixtures("signals_heard")
CPU = torch.device("cpu")


def test_nohup_stays_deaf_to_a_closed_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.name is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_is_noted_by_name(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert stop.name is None
        os.kill(os.getpid(), number)
        assert stop.name == number.name


def test_handlers_are_put_back_also_after_an_error() -> None:
    numbers = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    inside: list[object] = []

    def fail() -> None:
        with StopRequest():
            inside.extend(signal.getsignal(number) for number in numbers)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert inside != before
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_second_interrupt_interrupts_at_once() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.name == "SIGINT"


def test_a_second_sigterm_waits_for_the_save() -> None:
    """Schedulers and launchers repeat SIGTERM; only a person at the keyboard means it more the second time."""
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.name == "SIGTERM"


@distributed(world_size=2)
def test_all_ranks_agree_though_one_alone_was_asked(ranks: RankEnv, tmp_path: Path) -> None:
    from mmscale.runtime import groups

    groups.start(ranks)
    with StopRequest() as stop:
        assert stop.agreed(CPU) is False
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.agreed(CPU) is True
        assert stop.agreed(CPU) is True  # it stays a request
    groups.finalize()
