"""Pages about long runs: read and shown in little, with every event counted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import LineCollection

from launch.goodput import goodput
from mmscale.report import page, pictures
from tests.bounded_work import bounded_work
from tests.unit.report.test_page import data_of, figures, line_of, make_run, written


def test_a_long_run_is_read_and_shown_in_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 steps of 30 figures; a million take not one byte more."""
    more = {f"experts/{name}/{what}": 0.5 for name in ("text", "image") for what in "abcdefg"}
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "metrics.jsonl").open("w") as file:
        for step in range(1, 20_001):
            spike = {"loss": 500.0} if step == 12_345 else {}
            ranks = {"slowest_rank": 7 if step % 3 else 0, "save_stall_s": 30.0 if step == 7_777 else 0.01}
            values = {**figures(max(3, step % 97), 1000.0 + step), **more, **spike, **ranks}
            file.write(json.dumps({"step": step, "attempt": 1, **values}) + "\n")
    runs = page.read_runs([tmp_path / "run"], goodput=goodput)
    drawn = page.curves(runs)
    page.write_page(runs, tmp_path / "report.html", drawn=drawn)
    text = (tmp_path / "report.html").read_text()
    assert len(text) < 1_000_000
    line = line_of(text, "output_norm", "output_norm")
    assert len(line["mean"]) == 700
    assert max(line_of(text, "loss", "loss/text")["high"]) == pytest.approx(2 / 3, rel=1e-4)
    # The mean of a stretch hides its one long pause, and of ranks 0 and 7 it is neither.
    stalls, slowest = line_of(text, "stalls", "save_stall_s"), line_of(text, "slowest", "slowest_rank")
    assert (max(stalls["high"]), max(stalls["mean"]) < 2) == (30, True)
    assert set(slowest["mean"]) == {7} and "high" not in slowest
    figures_drawn: dict[str, Any] = {}
    monkeypatch.setattr(pictures, "save_figure", lambda figure, file: figures_drawn.update({file.name: figure}))
    pictures.write_pictures(runs, tmp_path / "r.html", drawn=drawn)
    panels = {axes.get_title(loc="left"): axes for axes in figures_drawn["r_throughput.png"].axes}
    (stems,) = [
        one for one in panels["Pauses since the last logged step [s]"].collections if type(one) is LineCollection
    ]
    assert max(segment[1][1] for segment in stems.get_segments()) == 30.0
    ranks_drawn = panels["Which rank was slowest"].lines[0].get_ydata()
    assert set(np.asarray(ranks_drawn).tolist()) == {7.0}


def test_every_event_is_counted_and_the_last_are_listed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (run / "events.jsonl").open("a") as file:
        for number in range(1000):
            event = {"time": 1100.0 + number, "attempt": 1, "event": "anomaly", "step": 30, "number": number}
            file.write(json.dumps(event) + "\n")
    text = written([run], tmp_path / "report.html")
    assert "1,000 events that are not routine; the last 200<" in text
    assert [int(number) for number in re.findall(r"<td>number (\d+)</td>", text)] == list(range(800, 1000))
    drawn = [one["text"] for one in data_of(text)["runs"][0]["timeline"]["events"] if one["event"] == "anomaly"]
    assert (len(drawn), drawn[0], drawn[-1]) == (300, "number 0", "number 999")


@pytest.mark.parametrize("attempts", [200, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (1, 50_000))])
def test_200_000_events_are_shown(tmp_path: Path, attempts: int) -> None:
    """However they are spread over attempts: the work grows with the events, and not with their square."""
    run = make_run(tmp_path / "run")
    names = ("launch", "resume", "save_committed", "skip")
    with (run / "events.jsonl").open("w") as file:
        for number in range(200_000):
            place = {"time": 1e9 + number, "attempt": 1 + number * attempts // 200_000, "step": number % 1000}
            file.write(json.dumps({**place, "event": names[number % 4], "reason": "x" * 40}) + "\n")
    with bounded_work():
        text = written([run], tmp_path / "report.html")
    assert len(text) < 10_000_000
