"""Every way to start a run beside every kind of holder: refused in words, with an exit status, and nothing written."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from launch import record as records
from launch import submit
from launch.scheduler import JobState
from mmscale.cli import main
from mmscale.resilience import lease, run_lock
from tests.unit.launch.fake_slurm import FakeSlurm
from tests.unit.launch.launchable import write_launchable
from tests.unit.resilience.test_run_lock import held

# Who holds which folder of the run; SLURM says that job 7 runs, and does not know job 9.
HOLDERS: dict[str, dict[str, str]] = {
    "train": {"by": "train"},
    "launched here": {"by": "launch"},
    "launched on SLURM": {"by": "launch", "job": "7"},
    "launched on another SLURM": {"by": "launch", "job": "9"},
    "a stage": {"by": "train", "folder": "auxiliary"},
}
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": "23456"}
# How a second one is started: arguments behind the configuration and its overrides, and variables.
STARTS: dict[str, tuple[list[str], dict[str, str]]] = {
    "train": (["train", "CONFIG"], {}),
    "train --nproc": (["train", "CONFIG", "--nproc", "2"], {}),
    "stage": (["train", "CONFIG", "--stage", "auxiliary"], {}),
    "launch": (["launch", "CONFIG"], {}),
    "launch on SLURM": (["launch", "CONFIG", "--cluster", "CLUSTER"], {}),
    "resume": (["resume", "RUN"], {}),
    "torchrun": (["train", "CONFIG"], TORCHRUN | {"MASTER_ADDR": "127.0.0.1"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration with its data, a profile, and a run that was launched here once."""
    folder = tmp_path_factory.mktemp("second")
    write_launchable(folder)
    (planned,) = submit.plan_launch(folder / "tiny.yaml", (), cluster="local")
    records.write_record(planned.record, planned.config)
    (folder / "runs/tiny/auxiliary").mkdir()
    return folder


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "SILENT_S", 3.0)


def start(folder: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of the command, in this process."""
    arguments, variables = STARTS[how]
    known = {"CONFIG": "tiny.yaml", "CLUSTER": "cluster.yaml", "RUN": "runs/tiny"}
    with monkeypatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        return main([str(folder / known[word]) if word in known else word for word in arguments])


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if not path.name.startswith(f".{lease.LEASE}")}


@pytest.mark.parametrize("holder", HOLDERS)
def test_it_is_refused_while_the_holder_lives(
    folder: Path, holder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeSlurm(tmp_path / "bin", **{"7": JobState("7", "RUNNING")})
    fake.answer("sbatch", "false")
    monkeypatch.setenv("PATH", f"{fake.folder}:{os.environ['PATH']}")
    how = dict(HOLDERS[holder])
    run = folder / "runs/tiny"
    place = run / how.pop("folder", ".")
    with held(place, **how) as process:
        before = files(run)
        for second in STARTS:
            status = start(folder, second, monkeypatch)
            said = capsys.readouterr().err
            assert status == 1, (second, said)
            assert f"process {process.pid} on" in said or "belongs to job 7, which is RUNNING" in said, (second, said)
            assert f"mmscale stop {place}" in said and "Traceback" not in said, (second, said)
            assert files(run) == before, second
            found = lease.owner(place)
            assert found is not None and found.process.pid == process.pid, second


def test_it_is_told_by_its_counter_from_where_the_process_is_not_seen(
    folder: Path, hurried: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The holder is in another PID namespace: as on another machine, or in another container of this one."""
    with held(folder / "runs/tiny", by="launch", place="another PID namespace"):
        for second in STARTS:
            if "SLURM" not in second:
                assert start(folder, second, monkeypatch) == 1, second
                said = capsys.readouterr().err
                assert "is being trained by process" in said, (second, said)


@contextlib.contextmanager
def recycled(run: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A lease whose holder is dead, and a process that has got its number since."""
    with held(run) as process:
        process.kill()
        process.wait()
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        found = lease.read(run / lease.LEASE)
        assert found is not None
        given = lease.replace(found, process=lease.replace(found.process, pid=other.pid))
        (run / lease.LEASE).write_bytes(lease.encode(given))
        yield other
    finally:
        other.kill()
        other.communicate()


@pytest.mark.parametrize("how", [[], ["--now"]])
def test_stop_leaves_a_process_alone_that_has_got_the_number_of_a_dead_one(
    folder: Path, how: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "runs/tiny"
    with recycled(run) as other:
        assert main(["stop", str(run), *how]) == 1
        assert f"does not run: process {other.pid} is gone" in capsys.readouterr().err
        assert other.poll() is None
        assert main(["status", str(run), "--json"]) == 0
        shown = yaml.safe_load(capsys.readouterr().out)[0]
        assert shown["ended"] and shown["state"] != "RUNNING", shown
        assert f"process {other.pid} " in shown["reason"]


def test_stop_and_status_know_a_run_that_was_never_launched(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with held(run) as process:
        (run / "config.yaml").write_text((folder / "tiny.yaml").read_text())
        assert main(["status", str(run), "--json"]) == 0
        shown = yaml.safe_load(capsys.readouterr().out)[0]
        assert (shown["state"], shown["nodes"], shown["ended"]) == ("RUNNING", os.uname().nodename, False)
        assert main(["logs", str(run)]) == 1
        assert "has no log of rank 0: attempt 1 is starting" in capsys.readouterr().err
        assert main(["stop", str(run), "--json"]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["done"] == "asked to save and end"
        assert process.wait(300) == -10  # SIGUSR1, which this one does not handle
