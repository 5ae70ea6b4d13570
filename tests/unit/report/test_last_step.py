"""The last step of a run: the last logged one, or that with which its last attempt ended."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mmscale.report.facts import results
from mmscale.report.history import History


def event(name: str, *, attempt: int = 1, step: int | None = None) -> dict[str, Any]:
    return {"time": 0.0, "attempt": attempt, "event": name} | ({} if step is None else {"step": step})


@pytest.mark.parametrize(
    ("events", "shown"),
    [
        ([], "10"),
        ([event("start")], "10"),
        ([event("stop", step=10)], "10"),
        ([event("stop", step=12)], "12, the last logged one is 10"),
        ([event("finish", step=12)], "12, the last logged one is 10"),
        ([event("ended_early", step=12)], "12, the last logged one is 10"),
        ([event("save_committed", step=12)], "10"),  # what follows it is not known
        ([event("stop", step=12), event("resume", attempt=2, step=5)], "10"),
        (
            [event("stop", step=12), event("resume", attempt=2, step=12), event("stop", attempt=2, step=13)],
            "13, the last logged one is 10",
        ),
    ],
)
def test_the_last_step(events: list[dict[str, Any]], shown: str) -> None:
    history = History(np.array([5.0, 10.0]), {"loss": np.array([2.0, 1.0])}, [])
    assert results(history, events=events)["last step"] == shown
