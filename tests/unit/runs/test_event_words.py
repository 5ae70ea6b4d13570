"""Figures that count events say what was counted: `8 spike` was read as eight kinds of a thing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mmscale.report.facts import results
from mmscale.report.history import History, read
from mmscale.report.timeline import timeline_of
from mmscale.runs.display_names import EVENTS
from mmscale.runs.events import ROUTINE

PAGE = Path(__file__).parents[3] / "docs/reference/run_folder.md"
NEVER_WRITTEN = {"died"}  # the report finds it


def documented() -> set[str]:
    """Names in the table of events of the page."""
    table = PAGE.read_text().partition("## Events")[2]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_every_event_that_needs_attention_has_words() -> None:
    assert documented() - set(ROUTINE) == set(EVENTS) - NEVER_WRITTEN
    assert all(words[-1].isalnum() or words.endswith(")") for words in EVENTS.values())


@pytest.fixture
def history(tmp_path: Path) -> History:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "attempt": 1, "loss": 1.0, "time": 1.0}\n')
    return read(tmp_path)


@pytest.mark.parametrize("name", sorted(EVENTS))
def test_a_card_has_the_words(name: str, history: History) -> None:
    events: list[dict[str, Any]] = [{"time": 1.0, "attempt": 1, "event": "start", "step": 0}]
    events += [{"time": 2.0, "attempt": 1, "event": name, "step": 1}] * 8
    found = results(
        history, timeline=timeline_of(events, history, begin=1.0, goodput=lambda *_, **__: (None, {})), events=events
    )
    assert found[EVENTS[name]] == "8" and name not in found


def test_an_event_of_a_plug_in_keeps_its_name(history: History) -> None:
    events: list[dict[str, Any]] = [{"time": 2.0, "attempt": 1, "event": "batch_of_ones", "step": 1}]
    assert results(history, events=events)["batch of ones"] == "1"
