"""What 64 ranks on 8 nodes ask of file system and scheduler, counted, and as `mmscale plan` predicts it."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch import job, rank_processes, stop_requests
from launch import record as records
from launch.record import Record
from launch.scheduler import JobState
from mmscale.config.load import load
from mmscale.plan import cluster_load as load_of
from mmscale.plan.cluster_load import cluster_load
from mmscale.resilience import lease
from mmscale.runs.events import read_events
from tests.unit.launch.fake_slurm import FakeSlurm

ROOT = Path(__file__).parents[3]
NODES, TASKS = 8, 8
_SRUN = """case "$*" in
*slurm.preflight*) for n in 1 2 3 4 5 6 7 8; do
  echo '{"node": "n'$n'", "time": '$(date +%s)', "problems": {}, "measured": {}}'; done;;
*slurm.bandwidth*) echo '{"all": 1.0}';;
*) sleep 3;;
esac"""


def launched(folder: Path, **profile: Any) -> Record:
    record = Record(
        folder=str(folder / "run" / "launch" / "001"),
        run=str(folder / "run"),
        cwd=str(folder),
        cluster="c",
        profile={"tasks_per_node": TASKS, "nodes": NODES, **profile},
        nodes=NODES,
        tasks_per_node=TASKS,
        max_restarts=0,
        max_without_progress=0,
    )
    Path(record.folder).mkdir(parents=True)
    Path(record.folder, records.RECORD).write_text(json.dumps(asdict(record)))
    return record


def test_a_job_asks_slurm_when_it_starts_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = launched(tmp_path)
    slurm = FakeSlurm(tmp_path / "bin", **{"1": JobState("1", "RUNNING", name="mmscale-run")})
    slurm.answer("srun", _SRUN)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-8]")
    monkeypatch.setattr(rank_processes, "_FIRST_LOOK_S", 0.5)
    looks: list[float] = []

    def stop_asked(folder: Path) -> bool:
        looks.append(time.monotonic())
        return False

    monkeypatch.setattr(stop_requests, "stop_asked", stop_asked)
    began = time.monotonic()
    assert job.main(Path(record.folder)) == 0
    assert len(slurm.calls("srun")) == load_of.STEPS_PER_START
    asked = [call for name in ("scontrol", "squeue", "sacct", "sinfo") for call in slurm.calls(name)]
    assert len(asked) <= load_of.QUESTIONS_PER_START, asked
    assert len(looks) <= (time.monotonic() - began) / load_of.STOP_S + 2


def test_a_job_gives_up_if_slurm_starts_no_rank_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After `slurm_patience`, with exit status 1: an outage is neither a crash nor the nodes' fault."""
    record = launched(tmp_path, slurm_patience="2s", preflight={"skip": {"all_reduce": "no ranks"}})
    slurm = FakeSlurm(tmp_path / "bin")
    slurm.away()
    away = "echo 'srun: error: Unable to confirm allocation for job 1: Unable to contact slurm controller' >&2; exit 1"
    slurm.answer("srun", _SRUN.replace("*) sleep 3", f"*) {away}"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-8]")
    assert job.main(Path(record.folder)) == 1
    events = [event["event"] for event in read_events(Path(record.run))]
    assert events == ["launch", "gave_up"], read_events(Path(record.run))
    assert "SLURM does not answer" in capsys.readouterr().err
    assert lease.owner(Path(record.run)) is None


def test_looks_at_the_lease(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For ten minutes of steps of half a second."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    reads: list[float] = []
    monkeypatch.setattr(lease, "time", clock)
    monkeypatch.setattr(lease, "read", lambda file: reads.append(clock.now) or lease.Lease("1.0.0", 1))
    told = {lease.VARIABLE: "1.0.0"}
    fences = [lease.Fence.of_rank(tmp_path, rank, told, local_rank=rank % TASKS) for rank in range(NODES * TASKS)]
    for half_second in range(1200):
        clock.now = half_second / 2
        for fence in fences:
            fence.check_if_due()
    predicted = load_of.lease_reads_per_s(NODES * TASKS, per_node=TASKS)
    assert len(reads) / 600 == pytest.approx(predicted, rel=0.03)
    assert load_of.LEASE_S == (lease.RANK_0_S, lease.NODE_S, lease.OTHERS_S)


def test_pauses_are_those_of_the_job() -> None:
    assert (load_of.STOP_S, load_of.PROGRESS_S) == (stop_requests._LOOK_S, rank_processes._PROGRESS_S)


@pytest.mark.parametrize(
    ("ranks", "wanted", "writers"),
    [(64, 0, 64), (64, 1, 8), (64, 2, 16), (64, 99, 64), (20, 1, 3), (20, 5, 14), (1, 1, 1)],
)
def test_files_of_a_checkpoint(ranks: int, wanted: int, writers: int) -> None:
    assert load_of.writers(ranks, per_node=TASKS, wanted=wanted) == writers
    assert load_of.checkpoint_files(ranks, per_node=TASKS, wanted=wanted) == 2 * writers + 6


def test_ten_thousand_ranks() -> None:
    """By hand: 1,280 nodes with one writer each; 100 GB at 50 GB/s take 2 s."""
    config = load(ROOT / "configs/moma_1b4_4t4i.yaml", ["checkpoint.writers=1"])
    found = cluster_load(config, 10_240, per_node=8, storage_gb_s=50.0)
    assert (found.nodes, found.checkpoint_files) == (1280, 2566)
    assert found.checkpoint_s == pytest.approx(2.0, rel=0.02)
    assert found.metadata_per_s == pytest.approx(1 + 1279 / 10 + 8960 / 60 + 1 + 1 / 30)
    assert found.scheduler_per_hour == 0 and found.scheduler_per_start == 7
