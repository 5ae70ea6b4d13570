"""Which nodes are kept out of later launches, for how long, and what is the job's fault instead of a node's."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from launch import cordon, nodes, scheduler
from launch.nodes import UnfitNode
from launch.profile import profile_of
from launch.record import Record
from tests.unit.launch.fake_slurm import FakeSlurm

DAY = 86400.0
NO_PROGRAM = "gpus: [Errno 2] No such file or directory: 'nvidia-smi'"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cordoned.txt"


def record(file: Path, *, count: int) -> Record:
    content = {"tasks_per_node": 1, "cordon_file": str(file), "cordon_expires": "10d"}
    profile = profile_of(content, where="here").model_dump(mode="json")
    return Record("f", str(file.parent / "run"), str(file.parent), "c", profile, count, 1, 3, 3)


def refused(file: Path, *, count: int, **bad: UnfitNode) -> tuple[str, str]:
    """What a job of some nodes says of bad ones."""
    one = record(file, count=count)
    error = nodes.refusal(one, one.checked_profile(), bad)
    return error.cause, error.remedy


def test_lines_expire_unless_a_person_wrote_them(file: Path) -> None:
    old = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - 11 * DAY))
    new = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - 9 * DAY))
    file.write_text(f"n1  # gpu_xid: 79, {old}\nn2  # gpu_xid: 79, {new}\nn3  # mine, forever\nn4\n# a remark\n")
    assert cordon.read(file, max_age_s=10 * DAY) == ["n2", "n3", "n4"]
    profile = record(file, count=1).checked_profile()
    assert profile.cordoned() == profile.excluded() == ["n2", "n3", "n4"]
    assert cordon.add(file, ["n1", "n2"], reason="disk", max_age_s=10 * DAY) == ["n1"]  # its line counts anew
    assert cordon.read(file, max_age_s=10 * DAY) == ["n2", "n3", "n4", "n1"]


def test_the_same_cause_on_two_nodes_is_the_jobs(file: Path) -> None:
    two = {node: UnfitNode(f"no answer: {node} said 7", True) for node in ("n1", "n2")}
    cause, remedy = refused(file, count=4, **two)
    assert not file.exists() and "n1 is not cordoned: several nodes have the same problem" in cause
    assert str(file) in remedy
    cause, _ = refused(file, count=4, **two, n3=UnfitNode("disk: 0.1 GB free", True))
    assert cordon.read(file) == ["n3"]
    file.unlink()
    refused(file, count=4, n1=UnfitNode("disk: 1 GB", True), n2=UnfitNode("clock: 40 s", True))  # two causes
    assert cordon.read(file) == ["n1", "n2"]


def test_devices_may_break_on_two_nodes_at_once(file: Path) -> None:
    broken = UnfitNode("gpus: 7 of 8 GPUs are there", True, hardware=True)
    refused(file, count=4, n1=broken, n2=broken)
    assert cordon.read(file) == ["n1", "n2"]
    file.unlink()
    cause, _ = refused(file, count=2, n1=broken, n2=broken)
    assert not file.exists() and "all nodes of the job have a problem" in cause


def test_the_same_cause_as_in_an_earlier_job_is_the_jobs_too(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Jobs of one node, one after the other."""
    refused(file, count=1, n1=UnfitNode("shared_memory: 0.05 GB", True))
    refused(file, count=1, n2=UnfitNode("shared_memory: 0.07 GB", True))
    assert cordon.read(file) == ["n1"]
    assert "n1 is there for the same: probably no node is at fault" in capsys.readouterr().err
    refused(file, count=1, n3=UnfitNode("gpu_xid: XID 79", True, hardware=True))
    refused(file, count=1, n4=UnfitNode("gpu_xid: XID 48", True, hardware=True))
    assert cordon.read(file) == ["n1", "n3", "n4"]


def test_a_program_that_is_not_on_path_is_no_fault_of_the_only_node() -> None:
    assert not nodes._is_own("gpus", NO_PROGRAM.partition(": ")[2])
    assert nodes._is_own("gpus", "7 of 8 GPUs are there") and not nodes._is_own("disk", "0 GB")


def test_nodes_that_the_cluster_does_not_have_are_not_excluded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch refuses a job that excludes an unknown node."""
    fake = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{fake.folder}:/usr/bin:/bin")
    fake.answer("sinfo", "echo n1; echo n2")
    assert scheduler.unknown_nodes(["n1", "gone"]) == ["gone"]
    fake.answer("sinfo", "exit 1")
    assert scheduler.unknown_nodes(["n1", "gone"]) == []
