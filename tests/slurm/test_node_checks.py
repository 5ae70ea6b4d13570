"""Which nodes are written into the cordon file, on a real SLURM: those that are broken, and no others."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import nodes, scheduler, submit
from launch.record import Record
from slurm.local.cluster import Cluster
from tests.slurm.jobs import Jobs, shown


def examined(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, *, hosts: str, script: str, **preflight: Any
) -> dict[str, nodes.UnfitNode]:
    """What the job of a launch would say of its nodes; `script` is run by bash before the check of each."""
    content = yaml.safe_load(jobs.profile.read_text())
    content["preflight"] |= preflight
    jobs.folder.joinpath("wanted.yaml").write_text(yaml.safe_dump(content))
    count = 2 if "-" in hosts else 1
    (planned,) = submit.plan_launch(
        jobs.config, [f"run.dir={jobs.folder}"], cluster=str(jobs.folder / "wanted.yaml"), nodes=count
    )
    record: Record = planned.record
    Path(record.run).mkdir(exist_ok=True)
    python = jobs.folder / "python"
    python.write_text(f'#!/bin/bash\n{script}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("SLURM_JOB_NODELIST", hosts)
    try:
        return nodes.examine(
            dataclasses.replace(record, python=str(python)), record.checked_profile(), interrupted=lambda: False
        )
    finally:
        monkeypatch.undo()


@pytest.mark.long
def test_a_check_that_breaks_on_one_node_ends_no_other(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = "[ $SLURMD_NODENAME = n2 ] && exit 3; sleep 1"  # n1 is still at it when n2 has ended
    found = examined(jobs, monkeypatch, hosts="n[1-2]", script=broken)
    assert list(found) == ["n2"], found
    assert "no answer" in found["n2"].text and found["n2"].cordon


@pytest.mark.long
def test_the_only_node_of_a_job_answers_for_itself_alone(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full file system is found on every node that the run comes to."""
    shared = examined(jobs, monkeypatch, hosts="n1", script="", disk_gb=1e9)
    assert not shared["n1"].cordon and shared["n1"].text.startswith("disk: ")
    own = examined(jobs, monkeypatch, hosts="n1", script="", disk_gb=1e9, shared_memory_gb=1e9)
    assert own["n1"].cordon and "shared_memory: " in own["n1"].text
    silent = examined(jobs, monkeypatch, hosts="n1", script="exit 3")
    assert not silent["n1"].cordon and "no answer" in silent["n1"].text


@pytest.mark.long
def test_a_full_file_system_ends_a_job_of_one_node_and_cordons_none(jobs: Jobs) -> None:
    content = yaml.safe_load(jobs.profile.read_text())
    content["preflight"] |= {"disk_gb": 1e9}
    content["cordon_file"] = str(jobs.folder / "cordoned.txt")
    profile = jobs.folder / "full.yaml"
    profile.write_text(yaml.safe_dump(content))
    run = dataclasses.replace(jobs, profile=profile, runs=jobs.runs).launch("train.steps=4", nodes=1)
    ended = run.until_ended()
    assert (ended.state, ended.exit_status) == ("FAILED", 1), run.report()
    (failed,) = run.events("preflight_failed")
    assert "disk: " in next(iter(failed["nodes"].values())) and shown(run)["state"] == "unfit nodes"
    assert not Path(content["cordon_file"]).exists()


def test_a_node_that_is_drained_is_not_lost(jobs: Jobs, cluster: Cluster) -> None:
    def become(state: str) -> dict[str, str]:
        cluster.run("scontrol", "update", "NodeName=n3", f"State={state}", "Reason=maintenance")
        return scheduler.lost_nodes("n[1-3]")

    try:
        assert scheduler.lost_nodes("n[1-3]") == {}
        assert become("DRAIN") == {}
        assert list(become("DOWN")) == ["n3"]
        assert scheduler.lost_nodes("n[1-2]") == scheduler.lost_nodes("") == {}
    finally:
        cluster.restore()
    assert scheduler.lost_nodes("n[1-3]") == {}
