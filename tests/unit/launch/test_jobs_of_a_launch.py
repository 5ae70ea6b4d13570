"""The jobs behind the one that trains: which of them live, and when one that starts has nothing left to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch import chain
from launch import record as records
from launch.record import JobKey, Record
from launch.scheduler import JobState
from launch.successors import Successors
from mmscale.runs.events import EventLog
from tests.unit.launch.fake_slurm import FakeSlurm


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "bin", **{number: JobState(number, "PENDING") for number in ("7", "8", "9")})
    monkeypatch.setenv("PATH", f"{fake.folder}:/usr/bin:/bin")
    return fake


@pytest.fixture
def record(tmp_path: Path) -> Record:
    folder = tmp_path / "run" / "launch" / "001"
    folder.mkdir(parents=True)
    (folder / records.RECORD).write_text("{}")
    records.set_job(folder, JobKey("7"), log="7.out")
    for number in ("8", "9"):
        records.add_job(folder, JobKey(number))
        records.add_job(folder, JobKey(number, cluster="here"))
    profile: dict[str, Any] = {"tasks_per_node": 1, "chain": 3}
    return Record(str(folder), str(tmp_path / "run"), str(tmp_path), "test", profile, 1, 1, 3, 2)


def successors(record: Record, job: str) -> Successors:
    return Successors(record, record.checked_profile(), job)


def test_a_launch_knows_its_jobs_in_their_order(record: Record) -> None:
    assert [key.id for _, key in chain.keys(Path(record.run))] == ["7", "8", "9"]
    assert [key.cluster for key in records.keys_of(Path(record.folder))] == ["", "here", "here"]


def test_others_that_live(record: Record, slurm: FakeSlurm) -> None:
    assert successors(record, "7").alive() == ["8", "9"]
    assert successors(record, "").alive() == []  # without SLURM
    slurm.jobs(**{"7": JobState("7", "COMPLETED"), "8": JobState("8", "RUNNING"), "9": JobState("9", "CANCELLED")})
    assert successors(record, "8").alive() == [] and successors(record, "7").alive() == ["8"]
    slurm.away()
    assert successors(record, "7").alive() == ["8", "9"]  # as they were submitted


def test_those_that_wait_are_cancelled_last_first(record: Record, slurm: FakeSlurm) -> None:
    successors(record, "7").cancel()
    assert slurm.calls("scancel") == ["9", "8"]
    slurm.away()
    successors(record, "7").cancel()  # says so, and no more


ENDINGS: list[tuple[dict[str, Any] | None, int | None]] = [
    ({"over": True, "action": "end", "status": 0}, 0),
    ({"over": True, "action": "end", "status": 75}, 75),
    ({"over": True, "action": "end", "status": 3}, 3),
    ({"over": True, "action": "end", "status": 137}, 75),  # before it could begin
    ({"over": True, "action": "end", "status": 137, "unsaved": True}, 137),
    ({"over": True, "action": "give_up", "status": 137}, 5),
    ({"over": False, "action": "requeue", "status": 75}, None),
    ({"over": False, "action": "end", "status": 137}, None),
    (None, None),  # it was killed
]


@pytest.mark.parametrize("in_place", [False, True], ids=["", "in_place"])
@pytest.mark.parametrize(("ending", "status"), ENDINGS)
def test_a_job_that_starts_after_the_end_of_the_run(
    record: Record, ending: dict[str, Any] | None, status: int | None, in_place: bool
) -> None:
    events = EventLog(Path(record.run), 1)
    assert successors(record, "8").end_of_run() is None
    events.add("launch", launch="001", job="7")
    if in_place:  # agents have started the ranks again (agent.begin_attempt)
        events.add("ranks_ended", action="in_place", checkpoint=5)
        events.add("launch", in_place=True, job="7")
    if ending is not None:
        events.add("ranks_ended", **ending)
    assert successors(record, "8").end_of_run() == status
    # A person has requeued it; what has reached its last step SLURM 24.11 starts again by itself after a preemption.
    assert successors(record, "7").end_of_run() == (0 if status == 0 else None)
    events.add("launch", launch="002", job="12")  # a person has launched it anew
    assert successors(record, "8").end_of_run() is None
