"""The job of a launch on this machine, with stub ranks: asked to end, killed, started again. No torch, no SLURM."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch import control, submit
from launch import record as records
from launch import status as states
from mmscale.resilience import lease
from mmscale.runs.events import read_events
from mmscale.runs.metrics import read_metrics
from tests.slurm.stub_rank import FAIL, SLOW, STATE
from tests.unit.launch.test_second_starts import folder  # noqa: F401  a configuration with its data

ROOT = Path(__file__).parents[3]


class Local:
    """Launches of one run, each in a process of its own."""

    def __init__(self, config: Path, runs: Path) -> None:
        self.config, self.runs, self.run = config, runs, runs / "tiny"
        self.python = runs / "python"
        stub = f"exec {sys.executable} {ROOT}/tests/slurm/stub_rank.py"
        self.python.write_text(f'#!/bin/bash\n[ "$2" = mmscale ] && {stub} "$@"\nexec {sys.executable} "$@"\n')
        self.python.chmod(0o755)
        self.started: list[subprocess.Popen[str]] = []
        self.planned: submit.Planned | None = None

    def launch(self, *, ignored: bool = False, **variables: str) -> subprocess.Popen[str]:
        """Start a job; `ignored`: under nohup; `variables`: of the stub, without their prefix."""
        if self.planned is None:  # the checks of a second launch would miss checkpoints, which stubs do not write
            overrides = [f"run.dir={self.runs}", "train.steps=4000"]
            (self.planned,) = submit.plan_launch(self.config, overrides, cluster="local")
        number = len(self.started) + 1
        place = str(self.run / "launch" / f"{number:03d}")
        record = dataclasses.replace(self.planned.record, python=str(self.python), folder=place)
        records.write_record(record, self.planned.config)
        command = [*(["nohup"] if ignored else []), sys.executable, "-m", "launch.job", record.folder]
        own = {f"MMSCALE_{name}": value for name, value in {SLOW: "0.05", **variables}.items()}
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | own
        job = subprocess.Popen(
            command, cwd=self.runs, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self.started.append(job)
        return job

    def step(self) -> int:
        lines = read_metrics(self.run)
        return int(lines[-1]["step"]) if lines else 0

    def until(self, condition: Callable[[], bool], *, within_s: float = 300.0) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline, [*read_events(self.run)[-5:]]
            time.sleep(0.05)

    def trains(self, **variables: str) -> subprocess.Popen[str]:
        """A job whose ranks have done a few steps."""
        job, known = self.launch(**variables), self.step()
        self.until(lambda: self.step() > known + 3)
        return job

    def rank(self) -> int:
        """Process id of rank 0, which has joined the lease."""
        held = lease.owner(self.run)
        assert held is not None and held.writer is not None
        return held.writer.pid

    def end(self) -> None:
        held = lease.owner(self.run)
        for job in self.started:
            job.kill()
            job.wait()
        if held is not None and held.writer is not None:
            held.writer.send(signal.SIGKILL)


@pytest.fixture
def local(folder: Path, tmp_path: Path) -> Iterator[Local]:  # noqa: F811
    found = Local(folder / "tiny.yaml", tmp_path)
    yield found
    found.end()


@pytest.mark.usefixtures("signals_heard")
@pytest.mark.parametrize(
    "name",
    ["SIGTERM", "SIGUSR2", *(pytest.param(name, marks=pytest.mark.long) for name in ("SIGHUP", "SIGUSR1", "SIGINT"))],
)
def test_every_request_to_end_saves(local: Local, name: str) -> None:
    job = local.trains()
    job.send_signal(signal.Signals[name])
    _, said = job.communicate(timeout=300)
    assert job.returncode == 75, said
    stopped = read_events(local.run)[-2:]
    assert [event["event"] for event in stopped] == ["stop", "ranks_ended"], stopped
    assert stopped[1]["signal"] == name
    assert json.loads((local.run / STATE).read_text())["step"] == stopped[0]["step"] == local.step()
    assert lease.owner(local.run) is None


@pytest.mark.parametrize(("failure", "status"), [("1", 1), ("KILL", 137)])
def test_a_stop_whose_save_fails_is_a_crash(local: Local, failure: str, status: int) -> None:
    job = local.trains(**{FAIL: failure})
    assert "save" in control.stop(local.run)["done"]
    _, said = job.communicate(timeout=300)
    assert job.returncode == status and "before a save" in said, said
    (ended,) = (event for event in read_events(local.run) if event["event"] == "ranks_ended")
    assert (ended["status"], ended["action"], ended["unsaved"], ended["over"]) == (status, "end", True, True)
    (shown,) = states.status([local.run])
    assert (shown["state"], shown["ended"]) == ("crashed", True)


def test_nohup_keeps_a_closed_terminal_from_ending_it(local: Local) -> None:
    job = local.launch(ignored=True)
    local.until(lambda: local.step() > 3)
    job.send_signal(signal.SIGHUP)
    step = local.step()
    local.until(lambda: local.step() > step + 20)
    assert job.poll() is None


def test_ranks_of_a_killed_supervisor_save_and_end_and_the_next_start_goes_on(local: Local) -> None:
    job = local.trains()
    rank = local.rank()
    job.kill()
    job.communicate()
    again = local.launch()  # at once: it waits for the rank to save
    local.until(lambda: any(event["event"] == "stop" for event in read_events(local.run)), within_s=120)
    (stopped,) = (event for event in read_events(local.run) if event["event"] == "stop")
    assert stopped["signal"] == "SIGTERM" and stopped["attempt"] == 1
    local.until(lambda: local.step() > stopped["step"] + 3)
    local.until(lambda: not Path(f"/proc/{rank}").exists(), within_s=120)  # until its new parent has waited for it
    (resumed,) = (event for event in read_events(local.run) if event["event"] == "resume")
    assert resumed["step"] == stopped["step"] and resumed["attempt"] == 2
    again.send_signal(signal.SIGTERM)
    assert again.wait(300) == 75


def test_stop_now_ends_the_ranks_too(local: Local) -> None:
    job = local.trains()
    rank = local.rank()
    (shown,) = states.status([local.run])
    assert (shown["state"], shown["ended"]) == ("RUNNING", False)
    assert control.stop(local.run, now=True)["done"] == "ended"
    assert job.wait(300) == -signal.SIGKILL
    local.until(lambda: not Path(f"/proc/{rank}").exists(), within_s=120)
    assert not any(event["event"] == "stop" for event in read_events(local.run))
    (shown,) = states.status([local.run])
    assert (shown["state"], shown["ended"]) == ("killed", True) and "is gone" in shown["reason"]
    again = local.trains()
    assert again.poll() is None
