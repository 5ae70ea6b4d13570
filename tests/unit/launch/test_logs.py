"""Which file `mmscale logs` shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import logs
from launch import record as records
from mmscale.cli import main
from mmscale.errors import LaunchError


def test_ranks_that_were_started_in_place_are_found_in_the_folder_of_the_first_start(tmp_path: Path) -> None:
    """The newest attempt's folder has only what its ranks wrote when they hung."""
    (tmp_path / "logs" / "attempt_9").mkdir(parents=True)
    (tmp_path / "logs" / "attempt_9" / "rank_0.log").write_text("an earlier start\n")
    (tmp_path / "logs" / "attempt_10").mkdir()
    (tmp_path / "logs" / "attempt_10" / "rank_0.log").write_text("first start\nsecond start\n")
    (tmp_path / "logs" / "attempt_11" / "hang").mkdir(parents=True)
    assert list(logs.lines(tmp_path)) == ["first start\nsecond start\n"]
    assert list(logs.lines(tmp_path, attempt=9)) == ["an earlier start\n"]
    for missing in ({"attempt": 11}, {"rank": 7}):
        with pytest.raises(LaunchError, match="has no log of rank"):
            list(logs.lines(tmp_path, **missing))  # type: ignore[arg-type]


def test_the_jobs_own_log_is_that_of_this_runs_task_and_of_its_newest_job_that_has_one(tmp_path: Path) -> None:
    """Tasks of an array print into the folder of its first launch."""
    first = tmp_path / "one" / "launch" / "001"
    (first / "submitit").mkdir(parents=True)
    for task, name in enumerate(("one", "two")):
        folder = tmp_path / name / "launch" / "001"
        folder.mkdir(parents=True, exist_ok=True)
        log = first / "submitit" / f"7_{task}_0_log.out"
        log.write_text(f"job of {name}\n")
        records.set_job(folder, records.JobKey(f"7_{task}"), log=str(log))
    assert list(logs.lines(tmp_path / "one", job=True)) == ["job of one\n"]
    assert list(logs.lines(tmp_path / "two", job=True)) == ["job of two\n"]
    waiting = tmp_path / "two" / "launch" / "002"
    waiting.mkdir()
    records.set_job(waiting, records.JobKey("9"), log=str(waiting / "submitit" / "9_0_log.out"))
    assert list(logs.lines(tmp_path / "two", job=True)) == ["job of two\n"]
    with pytest.raises(LaunchError, match="there is no folder"):
        list(logs.lines(tmp_path / "three", job=True))
    (tmp_path / "three").mkdir()
    with pytest.raises(LaunchError, match="has no log of its job"):
        list(logs.lines(tmp_path / "three", job=True))


def test_a_rank_that_printed_nothing_is_not_passed_over_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "logs" / "attempt_1"
    folder.mkdir(parents=True)
    (folder / "rank_0.log").write_text("step 1/2\n")
    (folder / "rank_1.log").touch()
    assert main(["logs", str(tmp_path), "--rank", "1"]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "note: rank 1 has printed nothing: rank 0 prints the progress of all ranks\n"
    assert main(["logs", str(tmp_path)]) == 0
    assert capsys.readouterr() == ("step 1/2\n", "")
