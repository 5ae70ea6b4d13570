"""Which signals a job notes, however it was started."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import record
from launch.job import Supervisor, main
from launch.scheduler import JobState
from launch.stop_requests import NOTED, StopRequests
from mmscale.runs.events import read_events
from tests.unit.launch.fake_slurm import FakeSlurm
from tests.unit.launch.test_cluster_load import launched


@pytest.fixture(params=[signal.SIG_DFL, signal.SIG_IGN], ids=["default", "ignored"])
def disposition(request: pytest.FixtureRequest) -> Iterator[signal.Handlers]:
    before = {number: signal.signal(number, request.param) for number in NOTED}
    yield request.param
    for number, handler in before.items():
        signal.signal(number, handler)


def test_what_a_batch_script_ignores_is_noted_and_what_nohup_ignores_is_not(
    disposition: signal.Handlers, tmp_path: Path
) -> None:
    """`trap '' USR1 USR2` protects the script until Python listens; ignored signals stay ignored over exec."""
    supervisor = Supervisor(launched(tmp_path))
    with supervisor.requests.noting_signals():
        for number in NOTED:
            os.kill(os.getpid(), number)
    supervisor.disk.close()
    expected = [number.name for number in NOTED if number != signal.SIGHUP or disposition != signal.SIG_IGN]
    assert supervisor.signals == expected


def test_a_stop_on_request_is_no_failure_for_slurm(tmp_path: Path) -> None:
    by_file, by_signal, neither = (tmp_path / name for name in ("file", "signal", "neither"))
    for folder in (by_file, by_signal, neither):
        folder.mkdir()
    record.ask_stop(by_file)
    signalled, preempted = StopRequests(by_signal), StopRequests(neither)
    signalled.signals.append("SIGUSR1")
    preempted.signals += ["SIGUSR2", "SIGTERM"]
    assert [one.status_for_slurm(75) for one in (StopRequests(by_file), signalled, preempted)] == [0, 0, 75]
    assert record.stop_asked(by_signal) and not record.stop_asked(neither)  # for `mmscale status`
    for status in (0, 1, 2, 3, 4, 5, 74, 137):  # how it ended counts more than what was asked
        assert StopRequests(by_file).status_for_slurm(status) == status


def test_a_job_that_starts_again_after_a_stop_says_why_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A person has requeued it, or SLURM: the request is still there."""
    launch = launched(tmp_path / "a run")
    fake = FakeSlurm(tmp_path / "bin", **{"1": JobState("1", "RUNNING")})
    monkeypatch.setenv("PATH", f"{fake.folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    record.ask_stop(Path(launch.folder))
    assert main(Path(launch.folder)) == 0
    assert f"a stop of this launch was requested; `mmscale resume '{launch.run}'` continues" in capsys.readouterr().err
    assert not read_events(Path(launch.run))


@pytest.mark.parametrize("preempted", ["", "PreemptTime=2026-01-01T00:01:00"])
def test_a_start_that_never_gets_to_its_ranks_in_time_is_not_repeated_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preempted: str
) -> None:
    """A time limit that node checks alone fill; a preemption meanwhile says nothing about the run."""
    launch = launched(tmp_path / "run")
    fake = FakeSlurm(tmp_path / "bin")
    job = f"JobId=1 JobName=x JobState=RUNNING Restarts=3 StartTime=2026-01-01T00:00:00 {preempted}"
    fake.answer("scontrol", f'case "$1" in requeue) echo "not permitted" >&2; exit 1;; esac; echo "{job}"')
    monkeypatch.setenv("PATH", f"{fake.folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    supervisor = Supervisor(launch)
    supervisor.signals.append("SIGUSR2")
    status = supervisor.run()
    supervisor.disk.close()
    asked = [call for call in fake.calls("scontrol") if call.startswith("requeue")]
    if preempted:
        assert (status, asked) == (75, ["requeue 1"]) and not read_events(Path(launch.run))
        return
    assert (status, asked) == (5, [])
    (gave_up,) = read_events(Path(launch.run))
    assert gave_up["event"] == "gave_up" and gave_up["why"] == (
        "ended once without a new checkpoint (there is none); resilience.max_restarts_without_progress is 0; "
        "at last stopped for SIGUSR2"
    )
