# mmscale/runtime/activity.py: what a user sees of work that takes a while.
"""Tests of lines about waiting."""

from __future__ import annotations

import time

import pytest

from mmscale.runtime import activity as module
from mmscale.runtime.activity import report_activity


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_LINE", 0.05)
    monkeypatch.setattr(module, "LINE_EVERY", 0.2)


def wait_for(lines: list[str], number: int) -> None:
    end = time.monotonic() + 20
    while len(lines) < number and time.monotonic() < end:
        time.sleep(0.01)


def test_each_work_has_a_line_and_long_work_several(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(module, "to_stderr", lines.append)
    with report_activity("loading torch") as update:
        wait_for(lines, 2)
        update("reading step 100")
        wait_for(lines, 3)
    assert lines[0] == "loading torch ..."
    assert lines[1].startswith("loading torch ... ") and lines[1].endswith(" s")
    assert "reading step 100 ..." in lines
    number = len(lines)
    time.sleep(0.3)
    assert len(lines) == number  # nothing after the end


def test_a_place_in_the_work_is_shown_by_the_later_lines_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A place changes several times a second, and a line for each would fill the screen."""
    lines: list[str] = []
    monkeypatch.setattr(module, "to_stderr", lines.append)
    with report_activity("evaluating") as update:
        for number in range(2000):
            update("evaluating", f"batch {number} of 2,000")
            if len(lines) > 2:
                break
            time.sleep(0.01)
    assert lines[0] == "evaluating ..." and 2 < len(lines) < 5
    assert all(line.startswith("evaluating ... batch ") and " of 2,000, " in line for line in lines[1:])


def test_short_work_is_not_mentioned(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_LINE", 60.0)
    with report_activity("adding"):
        pass
    with report_activity("nothing", enabled=False) as update:
        update("still nothing")
    assert capsys.readouterr().err == ""


def test_the_first_line_comes_within_two_seconds() -> None:
    assert 0.5 <= _real("FIRST_LINE") <= 2.0


def _real(name: str) -> float:
    import ast
    from pathlib import Path

    tree = ast.parse(Path(str(module.__file__)).read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return float(ast.literal_eval(node.value))
    raise AssertionError(name)
