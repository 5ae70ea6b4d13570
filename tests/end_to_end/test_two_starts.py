"""Ranks that train hold their run: seen by a second start of several ranks, by `status`, and by `stop`."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch import control, status
from mmscale.checkpoint.layout import Store
from mmscale.resilience import lease
from mmscale.runs.events import read_events
from mmscale.runs.metrics import read_metrics
from tests.end_to_end.lives import Life
from tests.end_to_end.running import ROOT, mmscale


def test_ranks_hold_their_run_until_it_is_stopped(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    settings = ["train", str(config), f"run.dir={tmp_path}", "train.steps=2000", "checkpoint.every=0"]
    life = Life(settings, faults="*:*:step:slow=0.1")
    life.until(lambda: len(read_metrics(run)) > 2)
    held = lease.owner(run)
    assert held is not None and held.process.pid == life.pids[0], life.said
    second = mmscale(*settings, nproc=2)
    assert second.status == 1
    for said in (second.err, second.others):  # every rank, and none of them waits for another
        assert f"is being trained by process {life.pids[0]} on" in said and "mmscale stop" in said
    (shown,) = status.status([run])
    assert (shown["state"], shown["ended"]) == ("RUNNING", False)
    assert control.stop(run)["done"] == "asked to save and end"
    assert life.end() == {0: 75, 1: 75}, life.said
    assert "Ctrl-C saves a checkpoint and ends it" in life.said
    beside = ("faults_requested", "data_verified")
    told = [event["event"] for event in read_events(run) if event["event"] not in beside]
    assert told == ["start", "save_begin", "save_committed", "stop"]
    assert Store.of_run(run).steps() == [read_metrics(run)[-1]["step"]]
    (shown,) = status.status([run])
    assert (shown["state"], shown["ended"]) == ("stopped", True)
    assert lease.owner(run) is None


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["--nproc", "torchrun"])
def test_a_killed_run_is_continued_as_its_remedy_says(launcher: str, config: Path, tmp_path: Path) -> None:
    """Everything is killed at once; `stop` names the command that goes on, which is then run as it is printed."""
    run = tmp_path / "runs" / "tiny"
    given = [f"run.dir={run.parent}", "train.steps=400", "checkpoint.every=5", "train.eval_every=0"]
    here = [sys.executable, "-m", "mmscale"]
    several = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    command = [*here, "train", str(config), *given]
    command = [*command, "--nproc", "2"] if launcher == "--nproc" else [*several, *command]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    started = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while len(Store.of_run(run).steps()) < 2:
            assert started.poll() is None, started.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        below = psutil.Process(started.pid).children(recursive=True) if started.poll() is None else []
        for process in (*below, started):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        started.communicate()
    ended = mmscale("stop", run)
    said = f"{ended.err}{ended.out}"
    assert ended.status != 0 and "start the same `mmscale train` again" in said, ended
    if launcher == "torchrun":
        assert "again with 2 ranks of torchrun, in the folder where it was started" in said and "--nproc" not in said
        again = [one for one in command if one != "train.steps=400"]
    else:
        (named,) = [one for one in re.findall(r"`([^`]*)`", said) if "config.yaml" in one]
        assert shlex.split(named) == ["mmscale", "train", str(run / "config.yaml"), "--nproc", "2"]
        again = [*here, *shlex.split(named)[1:]]
    last = Store.of_run(run).steps()[-1]
    again = [*again, f"train.steps={last + 2}"]
    done = subprocess.run(again, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done
    resumed = [event["step"] for event in read_events(run) if event["event"] == "resume"]
    assert resumed == [last] and Store.of_run(run).steps()[-1] == last + 2
