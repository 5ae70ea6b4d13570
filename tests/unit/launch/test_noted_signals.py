"""Which signals a job notes, however it was started."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.job import _NOTED, Supervisor
from tests.unit.launch.test_cluster_load import launched


@pytest.fixture(params=[signal.SIG_DFL, signal.SIG_IGN], ids=["default", "ignored"])
def disposition(request: pytest.FixtureRequest) -> Iterator[signal.Handlers]:
    before = {number: signal.signal(number, request.param) for number in _NOTED}
    yield request.param
    for number, handler in before.items():
        signal.signal(number, handler)


def test_what_a_batch_script_ignores_is_noted_and_what_nohup_ignores_is_not(
    disposition: signal.Handlers, tmp_path: Path
) -> None:
    """`trap '' USR1 USR2` protects the script until Python listens; ignored signals stay ignored over exec."""
    supervisor = Supervisor(launched(tmp_path))
    with supervisor.noting_signals():
        for number in _NOTED:
            os.kill(os.getpid(), number)
    supervisor.disk.close()
    expected = [number.name for number in _NOTED if number != signal.SIGHUP or disposition != signal.SIG_IGN]
    assert supervisor.signals == expected
