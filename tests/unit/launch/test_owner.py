"""Two jobs must not train one run: who is refused, by what is known of the owner."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launch import owner
from launch import record as records
from launch.scheduler import JobState
from mmscale.errors import LaunchError
from mmscale.resilience import lease, run_lock
from tests.unit.launch.fake_slurm import FakeSlurm


@pytest.fixture(autouse=True)
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """SLURM's word for every job of these tests: it runs."""
    fake = FakeSlurm(tmp_path / "bin", **{number: JobState(number, "RUNNING") for number in ("7", "8", "9")})
    monkeypatch.setenv("PATH", str(fake.folder))
    return fake


def test_a_job_owns_its_run_through_all_of_its_starts_and_nobody_else_does(tmp_path: Path) -> None:
    run = tmp_path / "run"
    owner.refuse_busy(run)  # nobody ever trained it
    run_lock.acquire(run, "7.0.0", attempt=1, job="7")
    owner.refuse_busy(run, job="7")
    for other in (None, "", "8"):
        with pytest.raises(LaunchError, match="belongs to job 7, which is RUNNING"):
            owner.refuse_busy(run, job=other)
    lease.release(run, "7.0.0")
    owner.refuse_busy(run, job="8")


def test_a_job_that_waits_counts_for_a_launch_and_not_for_the_job_that_it_waits_for(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "launch" / "002"
    folder.mkdir(parents=True)
    (folder / records.RECORD).write_text("{}")
    records.set_job(folder, records.JobKey("9"))
    run_lock.acquire(tmp_path / "run", "7.0.0", attempt=1, job="7")
    owner.refuse_busy(tmp_path / "run", job="7")  # its second start, with 9 chained behind it
    lease.release(tmp_path / "run", "7.0.0")
    with pytest.raises(LaunchError, match="belongs to job 9"):
        owner.refuse_busy(tmp_path / "run")


def test_without_slurm_a_process_owns_it_for_as_long_as_it_lives(tmp_path: Path) -> None:
    taken = f"run_lock.acquire(pathlib.Path({str(tmp_path)!r}), 'local-1.0.0', attempt=1)"
    lives = f"import pathlib, sys; from mmscale.resilience import run_lock; {taken}; print(flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", lives], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline()
    for job in (None, "", "8"):
        with pytest.raises(LaunchError, match=f"is being trained by process {holder.pid}"):
            owner.refuse_busy(tmp_path, job=job)
    holder.communicate()
    taken = f"run_lock.acquire(pathlib.Path({str(tmp_path)!r}), 'local-2.0.0', attempt=2)"
    gone = f"import pathlib; from mmscale.resilience import run_lock; {taken}"
    subprocess.run([sys.executable, "-c", gone], check=True)
    owner.refuse_busy(tmp_path)
