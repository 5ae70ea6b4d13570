"""No internal name in what people read: times of `mmscale status`, events of a report, unknown figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.goodput import goodput
from mmscale.cli import main
from mmscale.report.figure_titles import title_of
from mmscale.report.history import read
from mmscale.report.timeline import timeline_of
from mmscale.runs.display_names import TIME_PARTS, field_in_words
from mmscale.runs.events import read_events


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    events = [
        {"time": 10.0, "event": "start", "step": 0, "since": 4.0},
        {"time": 15.0, "event": "save_committed", "step": 4, "blocked_s": 0.33, "hash_s": 0.1, "bytes": 7},
        {"time": 16.0, "event": "checkpoint_bad", "step": 4, "kept_as": "step_4.bad", "seconds": 1.5},
        {"time": 17.0, "event": "finish", "step": 4},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps({"attempt": 1, **event}) + "\n" for event in events))
    (folder / "config.yaml").write_text("train: {steps: 4}\n")
    return folder


def test_status_says_where_the_time_went_in_words(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(run)]) == 0
    said = capsys.readouterr().out.replace("\n", " ")
    assert "start-up 6s, steps that count 0s, save stalls 0s" in said
    assert "_" not in said.rpartition(f"{run}: ")[2]


def test_every_part_of_the_time_has_words(run: Path) -> None:
    _, times = goodput(read_events(run), [], now=0.0)
    assert list(times) == list(TIME_PARTS)
    assert not [words for words in TIME_PARTS.values() if "_" in words or "," in words]  # they are listed with commas


def test_fields_of_events_are_words_with_their_units(run: Path) -> None:
    found = timeline_of(read_events(run), read(run), begin=0.0, goodput=goodput).events
    texts = {one.event: one.text for one in found}
    assert texts["save_committed"] == "blocked 0.33 s, hash 0.1 s, bytes 7"
    assert texts["checkpoint_bad"] == "kept as step_4.bad, seconds 1.5"
    assert field_in_words("why", "a_file is missing") == "why a_file is missing"


@pytest.mark.parametrize(
    ("key", "title", "unit"),
    [
        ("memory_stall_s", "Pauses: snapshots in memory", "s"),
        ("my_wait_s", "My wait", "s"),
        ("my_figure/in_text", "My figure: in text", ""),
    ],
)
def test_a_figure_without_a_title_gets_its_name_in_words(key: str, title: str, unit: str) -> None:
    assert title_of(key) == (title, unit)
