"""What `status` reads of metrics.jsonl: the same goodput from a few groups, and nothing twice."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from launch import status
from launch.goodput import goodput
from mmscale.runs import run_progress as progress
from mmscale.runs.events import EventLog
from mmscale.runs.metrics import METRICS
from mmscale.runs.run_progress import PROGRESS, RunProgress
from mmscale.runtime.disk_writer import replacing

LINES = some.lists(
    some.tuples(
        some.integers(1, 3),  # steps since the line before
        some.floats(0.1, 2.0),
        some.sampled_from([0.0, 0.0, 0.5]),
        some.booleans(),  # an evaluation in a line of its own
    ),
    min_size=1,
    max_size=30,
)


def written(attempt: int, begin: int, lines: list[tuple[int, float, float, bool]]) -> list[dict[str, Any]]:
    found, step = [], begin
    for more, seconds, stall, evaluated in lines:
        step += more
        line = {"step": step, "attempt": attempt, "step_time_s": seconds, "loss": 1.0}
        found.append(line | ({"save_stall_s": stall} if stall else {}))
        if evaluated:
            found.append({"step": step, "attempt": attempt, "eval/loss": 1.0, "eval_s": 0.25})
    return found


@given(first=LINES, second=LINES, resumed=some.integers(0, 40), cut=some.integers(0, 100_000))
@settings(max_examples=25, deadline=None)
def test_groups_give_the_goodput_of_the_lines(
    first: Any, second: Any, resumed: int, cut: int, tmp_path_factory: Any
) -> None:
    """Read in two parts, torn anywhere, by two processes of which the second goes on from what the first wrote."""
    run = tmp_path_factory.mktemp("run")
    lines = [*written(1, 0, first), *written(2, resumed, second)]
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    events = [
        {"time": 0.0, "attempt": 1, "event": "launch"},
        {"time": 5.0, "attempt": 1, "event": "start", "step": 0},
        {"time": 300.0, "attempt": 1, "event": "ranks_ended"},
        {"time": 310.0, "attempt": 2, "event": "launch"},
        {"time": 320.0, "attempt": 2, "event": "resume", "step": resumed},
    ]
    (run / METRICS).write_bytes(text[: cut % (len(text) + 1)])
    one = RunProgress.load(run)
    one.update(run)
    replacing(*one.file(run))()
    (run / METRICS).write_bytes(text)
    other = RunProgress.load(run)
    other.update(run)
    assert other.offset == len(text) and not other.update(run)
    assert other.last["step"] == next(line["step"] for line in reversed(lines) if "loss" in line)
    share, times = goodput(events, lines, now=900.0)
    found, parts = goodput(events, other.groups(), now=900.0)
    assert parts == pytest.approx(times, abs=1e-6) and found == pytest.approx(share, abs=1e-9)


def test_steps_that_are_done_again_after_a_roll_back_count_once(tmp_path: Path) -> None:
    lines = [{"step": step, "attempt": 1, "step_time_s": 1.0, "loss": 1.0} for step in (1, 2, 3, 4, 3, 4, 5)]
    (tmp_path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = RunProgress()
    found.update(tmp_path)
    assert sum(one.seconds for one in found.attempts[1]) == 5


def test_many_lines_become_few_groups_and_nearly_the_same(tmp_path: Path) -> None:
    """A resume in the middle of a group is the one place where a mean stands for single steps."""
    draw = random.Random(1)
    lines = written(1, 0, [(1, draw.uniform(0.9, 1.1), 0.0, False) for _ in range(20_000)])
    (tmp_path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = RunProgress()
    found.update(tmp_path)
    assert len(found.attempts[1]) <= 2 * progress._GROUPS
    events = [
        {"time": 0.0, "attempt": 1, "event": "launch"},
        {"time": 5.0, "attempt": 1, "event": "start", "step": 0},
        {"time": 20_300.0, "attempt": 1, "event": "ranks_ended"},
        {"time": 20_400.0, "attempt": 2, "event": "launch"},
        {"time": 20_500.0, "attempt": 2, "event": "resume", "step": 12_345},
    ]
    exact, near = (goodput(events, one, now=21_000.0)[1] for one in (lines, found.groups()))
    assert near == pytest.approx(exact, abs=10.0)


def bytes_read() -> int:
    """By this process, from files and pipes."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_status_of_a_long_run_reads_its_end(tmp_path: Path) -> None:
    """Of 9 MB less than one, where the job has noted the run's progress; and memory of a few lines."""
    run = tmp_path / "run"
    EventLog(run, 1).add("launch")
    EventLog(run, 1).add("start", step=0)
    (run / "config.yaml").write_text("train: {steps: 300000}\n")
    figures = {f"loss/{number}": 1.2345678 for number in range(20)}
    tail = json.dumps({"loss": 2.0, "step_time_s": 0.5, "attempt": 1, **figures})[1:] + "\n"
    with (run / METRICS).open("w") as file:
        file.writelines(f'{{"step": {step}, {tail}' for step in range(1, 20_001))
    noted = RunProgress.load(run)
    noted.update(run)
    replacing(*noted.file(run))()
    assert (run / PROGRESS).stat().st_size < 50_000
    with (run / METRICS).open("a") as file:
        file.write(f'{{"step": 20001, {tail}')
    assert (run / METRICS).stat().st_size > 9_000_000
    status.status([run])  # what it imports is read once
    before = bytes_read()
    tracemalloc.start()
    for _ in range(3):
        status._known_progress.cache_clear()  # as a new process
        (found,) = status.status([run])
        assert found["step"] == 20_001
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert bytes_read() - before < 1_000_000
    assert peak < 5_000_000
