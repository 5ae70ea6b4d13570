"""`restarts` of `mmscale status`: starts that nobody asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch import status
from mmscale.runs.events import EventLog

FIRST, REQUEUED = {"launch": "001", "restart": 0}, {"launch": "001", "restart": 1}
RESUMED, IN_PLACE = {"launch": "002", "restart": 0}, {"in_place": True}
SUCCESSOR = {"launch": "001", "job": "8", "restart": 0}  # of a chain


@pytest.mark.parametrize(
    ("starts", "restarts"),
    [
        ([], 0),
        ([FIRST], 0),
        ([FIRST, REQUEUED], 1),
        ([FIRST, IN_PLACE], 1),
        ([FIRST, SUCCESSOR], 1),
        ([FIRST, RESUMED], 0),
        ([FIRST, REQUEUED, RESUMED, IN_PLACE], 2),
    ],
)
def test_a_resume_is_no_restart(starts: list[dict[str, Any]], restarts: int, tmp_path: Path) -> None:
    for attempt, fields in enumerate(starts, start=1):
        log = EventLog(tmp_path, attempt)
        log.add("launch", **fields)
        log.add("start" if attempt == 1 else "resume", step=attempt - 1)
        log.close()
    (tmp_path / "config.yaml").write_text("train: {steps: 9}\n")
    (found,) = status.status([tmp_path])
    assert found["restarts"] == restarts
