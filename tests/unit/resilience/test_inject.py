"""Faults on request: what is understood, what is refused, and what happens at a place."""

from __future__ import annotations

import errno
import signal
from pathlib import Path

import pytest

from mmscale.errors import ConfigError
from mmscale.resilience import inject
from mmscale.resilience.inject import VARIABLE, Fault, Faults
from tests.module_time import replace_time


def faults(text: str, rank: int = 0) -> Faults:
    return Faults.of_rank(rank, {VARIABLE: text})


def test_without_the_variable_nothing_happens() -> None:
    none = Faults.of_rank(0, {})
    assert none.faults == []
    none.at("write", 1)
    assert none.warnings() == [] == faults(" , ").warnings()


def test_a_variable_that_is_set_is_said_on_every_rank() -> None:
    for rank in (0, 1):
        (line,) = faults("1:4:write:ENOSPC", rank).warnings()
        assert line.startswith("warning: MMSCALE_FAULTS is set") and "1:4:write:ENOSPC" in line


def test_faults_belong_to_ranks_steps_and_places() -> None:
    text = "1:4:write:ENOSPC, *:5:save:slow=0.5,0:*:step:kill"
    assert faults(text, 1).faults == [Fault(1, 4, "write", "ENOSPC"), Fault(None, 5, "save", "slow", 0.5)]
    assert [fault.place for fault in faults(text, 0).faults] == ["save", "step"]
    refused = faults("*:4:write:ENOSPC")
    refused.at("write", 3)
    refused.at("save", 4)
    for _ in range(2):  # a full disk stays full
        with pytest.raises(OSError, match="No space left") as raised:
            refused.at("write", 4)
        assert raised.value.errno == errno.ENOSPC


def test_a_rank_waits_while_a_file_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = tmp_path / "held"
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            held.unlink()

    replace_time(monkeypatch, inject, sleep=sleep)
    asked = faults(f"0:2:step:wait={held}")
    asked.at("step", 2)  # there is no file
    held.touch()
    asked.at("step", 3)
    assert waits == []
    asked.at("step", 2)
    assert len(waits) == 3 and not held.exists()


def test_a_signal_at_a_step_comes_once() -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: received.append(number))
    try:
        asked = faults("0:2:step:usr2")
        for step in (1, 2, 2, 3):
            asked.at("step", step)
        assert received == [signal.SIGUSR2]
        asked = faults("0:*:step:usr2")
        for step in (1, 2):
            asked.at("step", step)
        assert len(received) == 3
    finally:
        signal.signal(signal.SIGUSR2, before)


@pytest.mark.parametrize("text", ["write", "a:1:write:EIO", "0:1:write:slow=fast", "0:1:write"])
def test_what_is_no_fault(text: str) -> None:
    with pytest.raises(ConfigError, match=f"{VARIABLE}: {text!r} is no fault") as raised:
        faults(text)
    assert "RANK:STEP:PLACE:ACTION" in raised.value.remedy


@pytest.mark.parametrize("text", ["0:1:wrong:EIO", "0:1:write:EWRONG"])
def test_places_and_actions_that_do_not_exist(text: str) -> None:
    with pytest.raises(ConfigError, match="there is no") as raised:
        faults(text)
    assert "commit" in raised.value.remedy and "ENOSPC" in raised.value.remedy
