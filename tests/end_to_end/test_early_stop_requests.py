"""A run whose only rank still loads torch: `status`, `logs` and `stop` know it, and it ends at once when asked to."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from launch import control, status
from mmscale.cli import main
from mmscale.resilience import lease
from mmscale.runs.events import EventLog
from tests.end_to_end.running import Started, assert_says, mmscale, start


def loading(config: Path, tmp_path: Path, *, nproc: int = 1) -> tuple[Started, Path]:
    """A real `mmscale train` that has taken its run a moment ago."""
    run = tmp_path / "tiny"
    started = start("train", config, f"run.dir={tmp_path}", f"parallel.ep={nproc}", "--nproc", str(nproc))
    started.until(lambda: lease.owner(run) is not None)
    return started, run


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_run_is_known_while_it_loads_torch(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], nproc: int
) -> None:
    started, run = loading(config, tmp_path, nproc=nproc)
    try:
        (shown,) = status.status(status.known(tmp_path))
        assert main(["logs", str(run)]) == 1
        said = capsys.readouterr().err
        assert control.stop(run)["done"] == "asked to save and end"
    finally:
        ended = started.end()
    assert (shown["run"], shown["state"], shown["reason"], shown["ended"]) == (str(run), "RUNNING", "starting", False)
    assert "attempt 1 is starting" in said and "--follow" in said
    assert_says(ended, status=1, cause="stopped by SIGUSR1 before .*: nothing was saved", remedy="start it again")
    assert lease.owner(run) is None and not started.left_behind()
    assert not (run / "events.jsonl").exists()


@pytest.mark.long
@pytest.mark.usefixtures("signals_heard")
def test_a_second_attempt_is_known_while_it_loads_torch(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files of the first attempt, which has finished, do not hide it."""
    run = tmp_path / "tiny"
    (run / "logs" / "attempt_1").mkdir(parents=True)
    (run / "logs" / "attempt_1" / "rank_0.log").write_text("of the first attempt\n")
    events = EventLog(run, 1)
    for name in ("start", "finish"):
        events.add(name, step=60)
    events.close()
    (run / "config.yaml").write_text(config.read_text())
    assert status.status([run])[0]["state"] == "finished"
    started, run = loading(config, tmp_path)
    try:
        (shown,) = status.status([run])
        assert main(["logs", str(run)]) == 0
        said = capsys.readouterr()
        os.kill(started.process.pid, signal.SIGINT)
    finally:
        ended = started.end()
    assert (shown["state"], shown["reason"], shown["attempt"], shown["eta_s"]) == ("RUNNING", "starting", 2, None)
    assert said.out == "of the first attempt\n"
    assert "attempt 2 is starting and has printed nothing yet; above is" in said.err
    assert_says(ended, status=1, cause="stopped by SIGINT before training began", remedy="start it again")
    assert status.status([run])[0]["state"] == "finished"


def test_a_start_that_is_refused_takes_no_lock(config: Path, tmp_path: Path) -> None:
    ended = mmscale("train", config, f"run.dir={tmp_path}", "parallel.ep=1", f"data.path={tmp_path}/none")
    assert ended.status == 3 and not (tmp_path / "tiny").exists()
