"""Passes over data sets, done and planned: from the events of a run to the page, its PNG, and `data inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from mmscale.cli import main
from mmscale.runs.events import read_events
from mmscale.runs.sources_read import SourceRead, sources_read
from mmscale.train.log.metrics_log import MetricsLog

SOURCES: list[dict[str, Any]] = [
    {
        "path": "data/web<1>",
        "tokens": {"text": 1000, "image": 200},
        "max_epochs": None,
        "passes": [[0, 0.0], [10, 1.0], [20, 4.0]],
    },
    {"path": "data/books", "tokens": {"text": 500}, "max_epochs": 2, "passes": [[0, 0.0], [10, 2.0], [20, 2.0]]},
]
SOURCES[1]["repeated"] = 0.25

NAN = [{"path": "a", "tokens": {"text": 3}, "passes": [[0, "nan"]]}]


def make_run(folder: Path, *, steps: int = 15, sources: Any = SOURCES) -> Path:
    folder.mkdir()
    log = MetricsLog(folder, attempt=1)
    for step in range(1, steps + 1):
        log.write(step, {"loss": 2.0, "loss/text": 2.0, "tokens": 100.0 * step})
    log.close()
    event = {"time": 1000.0, "attempt": 1, "event": "start", "step": 0, "world_size": 1, "sources": sources}
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    (folder / "config.yaml").write_text("train: {steps: 20}\n")
    return folder


def test_passes_lie_on_straight_lines_between_the_steps_of_the_event(tmp_path: Path) -> None:
    events = read_events(make_run(tmp_path / "run"))
    assert sources_read(events, step=15) == [
        SourceRead("data/web<1>", {"text": 1000, "image": 200}, 2.5, 4.0),
        SourceRead("data/books", {"text": 500}, 2.0, 2.0, 2, 0.25),
    ]
    assert [one.done for one in sources_read(events, step=0)] == [0.0, 0.0]
    assert [one.done for one in sources_read(events, step=99)] == [4.0, 2.0]
    assert sources_read(events, step=15)[0].tokens_done == 3000
    later = [*events, {"event": "resume", "sources": [SOURCES[0] | {"passes": [[15, 2.5]]}]}]
    assert [one.done for one in sources_read(later, step=15)] == [2.5]


@pytest.mark.parametrize("sources", [None, [], "x", [{}], [{"path": "a", "tokens": {}, "passes": []}], [3], NAN])
def test_events_without_sources_show_nothing(tmp_path: Path, sources: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", sources=sources)
    assert sources_read(read_events(run), step=3) == []
    assert main(["data", "inspect", str(run)]) == 2
    said = capsys.readouterr().err
    assert "has no start event with its data sets" in said and "Traceback" not in said


def test_inspect_of_a_run_shows_passes_done_and_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    assert main(["data", "inspect", str(run)]) == 0
    said = capsys.readouterr().out
    assert "2.50 of 4.00 planned passes" in said and "2.00 of 2.00 planned passes, at most 2" in said
    assert "1,000 text + 200 image tokens in a pass, about 3k read" in said
    assert main(["data", "inspect", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 15 and found["sources"][1]["done"] == 2.0 and found["sources"][1]["max_epochs"] == 2


def test_the_estimate_of_tokens_has_no_more_digits_than_it_is_known_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From passes between two steps of the event; the trained tokens of metrics.jsonl are counted, and differ."""
    source = {"path": "a", "tokens": {"text": 536_957}, "max_epochs": None, "passes": [[0, 0.0], [15, 1.99994]]}
    run = make_run(tmp_path / "run", sources=[source])
    assert main(["data", "inspect", str(run)]) == 0
    assert "tokens in a pass, about 1.07M read" in capsys.readouterr().out
    assert main(["report", str(run), "--out", str(tmp_path / "report.html"), "--no-png"]) == 0
    assert "<td>about 1.07M</td>" in (tmp_path / "report.html").read_text()


def test_steps_after_the_last_logged_one_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """15 steps are logged, and the run was stopped after step 18."""
    run = make_run(tmp_path / "run")
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": 1100.0, "attempt": 1, "event": "stop", "step": 18}) + "\n")
    assert main(["data", "inspect", str(run)]) == 0
    said = capsys.readouterr().out
    assert "step 18" in said and "3.40 of 4.00 planned passes" in said
    assert main(["report", str(run), "--out", str(tmp_path / "report.html"), "--no-png"]) == 0
    assert "<td>3.40</td><td>4.00</td>" in (tmp_path / "report.html").read_text()


def test_the_page_shows_them_as_a_figure_and_a_table(tmp_path: Path) -> None:
    run, old = make_run(tmp_path / "run"), make_run(tmp_path / "old", sources=None)
    out = tmp_path / "report.html"
    assert main(["report", str(run), "--out", str(out)]) == 0
    page = out.read_text()
    assert '<h2 id="data-sets">Data sets</h2>' in page and 'alt="passes"' in page
    assert "<th>repeated documents</th>" in page and "<td>25.0%</td>" in page
    assert "<td>about 3k</td>" in page
    assert "<td>data/web&lt;1&gt;</td><td>1,000 text + 200 image</td><td>2.50</td><td>4.00</td>" in page
    assert "sources [" not in page  # in the words of the timeline
    with PIL.Image.open(tmp_path / "report_data.png") as picture:
        assert picture.width > 800
    both = tmp_path / "both.html"
    assert main(["report", str(run), str(old), "--out", str(both), "--no-png"]) == 0
    assert "data/books" in both.read_text()
    alone = tmp_path / "alone.html"
    assert main(["report", str(old), "--out", str(alone)]) == 0
    assert 'id="data-sets"' not in alone.read_text() and not (tmp_path / "alone_data.png").exists()
