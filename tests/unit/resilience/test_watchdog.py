"""The hang watch: when it speaks, what it says, whom it blames."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch

from mmscale.resilience import watchdog as watchdog_module
from mmscale.resilience.watchdog import HUNG, HangReport, Watchdog, culprits, reports
from tests.module_time import replace_time
from tests.support import distributed


def report(
    rank: int, *, borders: int = 5, in_collective: bool = True, late_s: float = 0.4, **collectives: int
) -> HangReport:
    return HangReport(rank, "n1", 5, borders, 9.0, in_collective, [], collectives, late_s)


@pytest.mark.parametrize(
    ("found", "world_size", "blamed"),
    [
        ([report(0), report(1, in_collective=False)], 2, [1]),
        ([report(0), report(2)], 3, [1]),  # stopped: it could not say anything
        ([report(0), report(1, late_s=3.2)], 2, [1]),  # stopped, and woken when rank 0 had ended
        ([report(0, late_s=5.0, borders=6), report(1, late_s=5.0)], 2, [1]),  # a host that was busy
        ([report(0, borders=6), report(1, borders=5)], 2, [1]),
        ([report(0, in_collective=False), report(1, in_collective=False, borders=4)], 2, [1]),
        ([report(0), report(1)], 2, [0, 1]),
        # All wait, but rank 2 in another collective: it has not entered the one of all ranks yet.
        ([report(0, all=9, tp=4), report(1, all=9, tp=4), report(2, all=8, tp2=5), report(3, all=9, tp2=5)], 4, [2]),
        ([report(0, all=9), report(1, all=9)], 2, [0, 1]),
    ],
)
def test_who_is_to_blame(found: list[HangReport], world_size: int, blamed: list[int]) -> None:
    assert culprits(found, world_size=world_size) == blamed


@pytest.fixture(autouse=True)
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit statuses with which watchdogs would have ended the process."""
    statuses: list[int] = []
    monkeypatch.setattr(watchdog_module, "_exit", statuses.append)
    return statuses


def until(condition: object, what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_it_reports_once_no_step_ends_and_ends_the_process(
    tmp_path: Path, ended: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    with Watchdog(rank=3, folder=tmp_path, timeout_s=0.3) as watchdog:
        watchdog.beat(7)
        until(lambda: ended, "it ends the process")
    assert ended == [HUNG]
    (found,) = reports(tmp_path)
    assert (found.rank, found.step, found.borders, found.in_collective) == (3, 7, 1, False)
    assert found.waited_s >= 0.3 and any("test_watchdog.py" in line for line in found.stack)
    said = capfd.readouterr().err
    assert "after step 7; stacks of rank 3" in said and "until" in said


def test_steps_that_end_and_a_start_that_takes_long_are_no_hang(
    tmp_path: Path, ended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock of its own, because a busy machine may take any time between two steps."""
    now = [0.0]
    replace_time(monkeypatch, watchdog_module, monotonic=lambda: now[0])
    with Watchdog(rank=0, folder=tmp_path, timeout_s=0.5) as watchdog:
        now[0] = 100.0  # no step has begun: nothing is watched
        time.sleep(0.3)
        for step in range(8):
            watchdog.beat(step)
            now[0] += 0.4
            time.sleep(0.1)
    assert not ended and reports(tmp_path) == []


def test_a_border_that_comes_while_it_reports_saves_the_process_until_it_hangs_again(
    tmp_path: Path, ended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Watchdog(rank=0, folder=tmp_path, timeout_s=0.2) as watchdog:
        watchdog.beat(1)
        until(lambda: reports(tmp_path), "it reports")
        watchdog.beat(2, allowed_s=600.0)  # no new hang while what it does about the old one is looked at
        until(lambda: not reports(tmp_path), "the launcher would take the report for a hang")
        assert not ended
        monkeypatch.setattr(watchdog_module, "_GRACE_S", 0.1)
        watchdog.beat(3)
        until(lambda: ended, "it ends the process")
    assert ended == [HUNG] and [one.step for one in reports(tmp_path)] == [3]


@pytest.mark.parametrize(("error", "left"), [(None, 0), (ConnectionError("a peer has ended itself"), 1)])
def test_what_is_left_of_a_report_that_the_loops_end_overtakes(
    tmp_path: Path, error: Exception | None, left: int
) -> None:
    with (
        contextlib.suppress(ConnectionError),
        Watchdog(rank=0, folder=tmp_path, timeout_s=0.2) as watchdog,
    ):
        watchdog.beat(1)
        until(lambda: reports(tmp_path), "it reports")
        if error is not None:
            raise error
    assert len(reports(tmp_path)) == left


def test_it_ends_the_process_whatever_goes_wrong_with_its_report(
    tmp_path: Path, ended: list[int], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog_module, "_GRACE_S", 0.1)
    logs = tmp_path / "logs"
    logs.write_text("")  # a file where a folder should be: nothing can be written below it
    for folder, recorded in ((logs, lambda: None), (tmp_path / "attempt_1", dict[str, str]().popitem)):
        with Watchdog(rank=3, folder=folder, timeout_s=0.2, recorded=recorded) as watchdog:  # type: ignore[arg-type]
            watchdog.beat(7)
            until(lambda: len(ended) > (folder is not logs), "it ends the process")  # noqa: B023
        said = capfd.readouterr().err
        assert said.index("stacks of rank 3") < said.index("Error: ")
    assert ended == [HUNG, HUNG]
    assert len(reports(tmp_path / "attempt_1")) == 1  # where only the recorder is broken


def test_a_disk_that_does_not_answer_is_no_hang(
    tmp_path: Path, ended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watch waits for it, whether steps go on or not; a hang that is still there afterwards is found."""
    monkeypatch.setattr(watchdog_module, "_DISK_S", 0.1)
    monkeypatch.setattr(watchdog_module, "_GRACE_S", 0.1)
    thawed = threading.Event()
    with Watchdog(rank=0, folder=tmp_path, timeout_s=0.2) as watchdog:
        write = watchdog._write
        monkeypatch.setattr(watchdog, "_write", lambda *report: (thawed.wait(60), write(*report)))
        watchdog.beat(1)
        time.sleep(1.5)
        assert not ended and reports(tmp_path) == []
        thawed.set()
        until(lambda: ended, "the hang is still there")
    assert ended == [HUNG] and [one.step for one in reports(tmp_path)] == [1]


def test_the_time_is_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watchdog = Watchdog(rank=0, folder=tmp_path, timeout_s=None)
    times = iter([0.0, 40.0, 50.0, 1000.0, 1040.0])
    replace_time(monkeypatch, watchdog_module, monotonic=lambda: next(times))
    watchdog.beat(1)
    assert watchdog.timeout_s == 300.0
    watchdog.beat(2)
    watchdog.beat(3, allowed_s=900.0)
    assert watchdog.timeout_s == 1300.0  # a save is waited for
    watchdog.beat(4)
    assert watchdog.timeout_s == 400.0  # how long it took says nothing about steps
    watchdog.beat(5)
    assert watchdog.timeout_s == 400.0


@distributed(world_size=2)
def test_a_rank_that_waits_in_a_collective_is_told_from_one_that_does_not(ranks, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from mmscale.resilience import flight_recorder
    from mmscale.runtime import groups

    os.environ["TORCH_FR_BUFFER_SIZE"] = "64"
    begin = time.time_ns()
    groups.start(ranks)
    torch.distributed.all_reduce(torch.ones(1))
    go_on = tmp_path / "go_on"

    def recorded() -> str:
        """Without what this fork has inherited from tests that ran in its parent."""
        found = json.loads(flight_recorder.dump() or "{}")
        return json.dumps({"entries": [one for one in found["entries"] if one["time_created_ns"] > begin]})

    with Watchdog(rank=ranks.rank, folder=tmp_path, timeout_s=0.5, recorded=recorded) as watchdog:
        watchdog.beat(4)
        if ranks.rank == 1:
            until(lambda: len(reports(tmp_path)) == 2, "both report")
            found = reports(tmp_path)
            assert [one.in_collective for one in found] == [True, False]
            assert culprits(found, world_size=2) == [1]
            ahead, behind = (one.collectives for one in found)
            assert ahead.keys() == behind.keys() and [ahead[group] - behind[group] for group in ahead] == [1]
            go_on.touch()
        torch.distributed.all_reduce(torch.ones(1))
    assert go_on.exists()
    written = json.loads((tmp_path / "hang" / f"flight_{ranks.rank}.json").read_text())
    assert written["entries"][-1]["profiling_name"] == "gloo:all_reduce"
    groups.finalize()
