"""Who requeues a preempted job: slurmctld since 24.05, if nothing forbids it, and the job itself otherwise."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch import budget as budgets
from launch import preemption
from launch.allocation import Allocation
from launch.job import Supervisor
from mmscale.runs.events import read_events
from tests.unit.launch.fake_slurm import FakeSlurm
from tests.unit.launch.test_cluster_load import launched

CONFIG = {"SLURM_VERSION": "24.11.5", "PreemptType": "preempt/partition_prio", "MaxBatchRequeue": "5"}
JOB = {"JobId": "1", "JobName": "x", "JobState": "RUNNING", "Requeue": "1", "Restarts": "0", "Partition": "low"}
JOB |= {"PreemptTime": "2026-01-01T00:01:00", "StartTime": "2026-01-01T00:00:00"}
PARTITION = {"PartitionName": "low", "GraceTime": "60", "PreemptMode": "REQUEUE"}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{fake.folder}:{os.environ['PATH']}")
    return fake


def answers(slurm: FakeSlurm, **changed: str) -> None:
    """What scontrol shows; a value of "" is left out."""
    config, job, partition = ({**known, **changed} for known in (CONFIG, JOB, PARTITION))
    config_lines = "\n".join(f"{key:<24}= {value}" for key, value in config.items() if value)
    job_line, partition_line = (
        " ".join(f"{key}={value}" for key, value in known.items() if value) for known in (job, partition)
    )
    script = f"""case "$*" in
*config*) cat <<'END'
Configuration data as of 2026-01-01T00:00:00
{config_lines}
END
;;
*partition*) echo "{partition_line}";;
*job*) echo "{job_line}";;
*) echo "not permitted" >&2; exit 1;;
esac"""
    slurm.answer("scontrol", script)


@pytest.mark.parametrize(
    ("changed", "before", "by_slurm"),
    [
        ({}, 0, True),
        ({"SLURM_VERSION": "24.05.0"}, 0, True),
        ({"SLURM_VERSION": "25.11.1"}, 0, True),
        ({"SLURM_VERSION": "23.11.10"}, 0, False),
        ({"SLURM_VERSION": "22.05.8"}, 0, False),
        ({"SLURM_VERSION": ""}, 0, False),
        ({"PreemptType": "preempt/qos"}, 0, False),
        ({"PreemptMode": "GANG,REQUEUE"}, 0, True),
        ({"PreemptMode": "CANCEL"}, 0, False),
        ({"Requeue": "0"}, 0, False),
        # slurmctld would hold the job at the fifth
        ({}, 3, True),
        ({}, 4, False),
        ({"MaxBatchRequeue": "9"}, 7, True),
        ({"MaxBatchRequeue": "9"}, 8, False),
        ({"MaxBatchRequeue": ""}, 3, True),
        ({"MaxBatchRequeue": "1"}, 0, False),
    ],
)
def test_who_requeues_a_preempted_job(slurm: FakeSlurm, changed: dict[str, str], before: int, by_slurm: bool) -> None:
    answers(slurm, **changed)
    assert preemption.requeued_at_end("1", before=before) == by_slurm


def test_without_an_answer_the_job_requeues_itself(slurm: FakeSlurm) -> None:
    slurm.away()
    assert not Allocation("1", patience_s=0.0, interrupted=lambda: False).requeued_at_end(before=0)


@pytest.mark.parametrize("version", ["24.11.5", "22.05.8"])
def test_a_preempted_job_is_requeued_once(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """Here before it has started ranks, and where `scontrol requeue` is refused at once."""
    answers(slurm, SLURM_VERSION=version)
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    launch = launched(tmp_path / "run")
    supervisor = Supervisor(launch)
    supervisor.signals.append("SIGTERM")
    assert supervisor.run() == 75
    supervisor.disk.close()
    own = [call for call in slurm.calls("scontrol") if call.startswith("requeue")]
    budget = budgets.load(Path(launch.folder))
    assert budget is not None
    assert (own, budget.by_slurm) == (([], 1) if version == "24.11.5" else (["requeue 1"], 0))
    assert budget.without_progress == 0


@pytest.mark.parametrize(
    ("state", "preempted_at", "taken"),
    [
        ("RUNNING", "", False),
        ("RUNNING", "2025-12-31T23:59:59", False),  # an earlier start
        ("RUNNING", "2026-01-01T00:01:00", True),
        ("COMPLETING", "", True),  # requeued: a node has failed, or a person has asked for it
        ("CANCELLED", "", True),
        ("SUSPENDED", "", False),
        ("OF_A_NEWER_SLURM", "", False),
    ],
)
def test_a_job_whose_nodes_are_taken_away(slurm: FakeSlurm, state: str, preempted_at: str, taken: bool) -> None:
    answers(slurm, JobState=state, PreemptTime=preempted_at)
    allocation = Allocation("1", patience_s=0.0, interrupted=lambda: False)
    assert allocation.taken_away() == taken
    assert allocation.preempted() == (preempted_at > JOB["StartTime"])
    slurm.away()
    assert not allocation.taken_away()


def test_nodes_of_a_job_that_slurm_is_ending_are_not_judged(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step of the check is ended with it; the other job of a run might be told to leave healthy nodes out."""
    answers(slurm, JobState="COMPLETING", PreemptTime="")
    slurm.answer("srun", 'echo "srun: error: Node failure on n2" >&2; exit 1')
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-8]")
    launch = launched(tmp_path / "run")
    supervisor = Supervisor(launch)
    assert supervisor.run() == 75
    supervisor.disk.close()
    assert slurm.calls("srun") and not read_events(Path(launch.run))
    assert not [call for call in slurm.calls("scontrol") if call.startswith("requeue")]
