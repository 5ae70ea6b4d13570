"""The step that a run has reached, which need not be the last one that it logged."""

from __future__ import annotations

from typing import Any

import pytest

from mmscale.runs.last_step import last_step


def event(name: str, attempt: int, step: int | None = None) -> dict[str, Any]:
    return {"time": 0.0, "attempt": attempt, "event": name} | ({} if step is None else {"step": step})


START = event("start", 1, 0)


@pytest.mark.parametrize(
    ("events", "wanted"),
    [
        ([], 10),
        ([START], 10),
        ([START, event("stop", 1, 10)], 10),
        ([START, event("stop", 1, 12)], 12),
        ([START, event("finish", 1, 12)], 12),
        ([START, event("ended_early", 1, 12)], 12),
        ([START, event("save_committed", 1, 12)], 10),  # more steps may follow it
        ([START, event("stop", 1, 12), event("resume", 2, 12)], 12),
        ([START, event("stop", 1, 12), event("resume", 2, 5)], 5),  # its checkpoint was damaged
        ([START, event("resume", 2, 12), event("stop", 2, 13)], 13),
        ([START, event("stop", 1, 12), event("launch", 2)], 12),  # has not resumed yet
        ([START, event("stop", 1, 12), event("launch", 2), {"event": "stop", "step": "x", "attempt": None}], 12),
    ],
)
def test_the_last_step(events: list[dict[str, Any]], wanted: int) -> None:
    """The first attempt has logged step 10 last."""
    assert last_step(events, logged=10, attempt=1) == wanted


def test_a_later_attempt_has_logged() -> None:
    events = [START, event("stop", 1, 12), event("resume", 2, 5)]
    assert last_step(events, logged=8, attempt=2) == 8


def test_nothing_was_logged() -> None:
    assert last_step([START, event("stop", 1, 3)], logged=0, attempt=0) == 3
