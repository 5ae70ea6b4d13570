"""Preparation, training and the auxiliary stage are each killed with -9, and the end is the same.

A tiny model here; `make killed` does it to `make quickstart` itself, beside one that nobody disturbed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mmscale.inference.evaluate
import mmscale.train.run
from mmscale.data.prepared.manifest import MANIFEST
from mmscale.runs.events import read_events
from mmscale.runs.metrics import read_metrics
from tests.end_to_end.lives import Life
from tests.end_to_end.running import MARK, ROOT, Started, listing, mmscale
from tests.end_to_end.test_train import EXACT

REFERENCE = os.environ.get("MMSCALE_QUICKSTART")


def numbers(run: Path) -> dict[str, Any]:
    """What must be the same: every logged step of both stages, and the routers' figures."""
    main, stage = read_metrics(run), read_metrics(run / "auxiliary")
    report = json.loads((run / "auxiliary" / "report.json").read_text())
    del report["main_digest"]  # of a checkpoint, which holds the time of its save
    return {
        "main": {line["step"]: {key: line.get(key) for key in EXACT} for line in main},
        "auxiliary": {line["step"]: {key: line[key] for key in ("loss", "grad_norm", "lr")} for line in stage},
        "report": report,
    }


def content(data: Path) -> dict[str, bytes]:
    """A data set without what is made when it is read."""
    return {name: what for name, what in listing(data).items() if not name.startswith(".cache")}


def reached(folder: Path, step: int) -> Callable[[], bool]:
    """Whether a stage has logged this step."""
    return lambda: any(line["step"] >= step for line in read_metrics(folder))


def saved(folder: Path) -> bool:
    """Whether there is a checkpoint to go on from."""
    return any((folder / "checkpoints").glob("step_????????"))


def resumed(folder: Path) -> list[int]:
    """Steps after which attempts went on."""
    return [event["step"] for event in read_events(folder) if event["event"] == "resume"]


@pytest.mark.long
def test_killed_in_every_part_it_ends_with_the_same_numbers(config: Path, digits: Path, tmp_path: Path) -> None:
    settings = ("train.steps=20", "checkpoint.every=3", "train.eval_every=10")
    stage = ("--stage", "auxiliary", "auxiliary.steps=80", "auxiliary.checkpoint_every=10")
    stage = (*stage, "auxiliary.calibration_batches=2")

    def trained(place: Path, data: Path) -> tuple[list[str], list[str]]:
        main = ["train", str(config), f"run.dir={place}", f"data.path={data}", *settings]
        return main, [*main, *stage]

    for arguments in trained(tmp_path / "whole", digits):
        ended = mmscale(*arguments, nproc=2)
        assert ended.status == 0, ended

    data, run = tmp_path / "digits", tmp_path / "killed" / "tiny"
    prepare = ["data", "prepare", str(config), "--out", str(data)]
    main, auxiliary = trained(run.parent, data)
    # Saved by step 12 for certain, where ranks wait to be killed; other saves are asynchronous.
    first, faults = [*main, "checkpoint.asynchronous=false"], "*:12:step:hang"
    lives: list[tuple[list[str], int, Callable[[], bool]]] = [
        (prepare, 1, lambda: (data / "text_tokenizer").exists()),
        (main, 2, lambda: reached(run, 11)() and saved(run)),
        (auxiliary, 2, lambda: reached(run / "auxiliary", 11)() and saved(run / "auxiliary")),
    ]
    for arguments, nproc, moment in lives:
        life = Life(first, faults=faults) if arguments is main else Life(arguments, nproc=nproc)
        life.until(moment)
        for pid in life.pids:
            os.killpg(pid, signal.SIGKILL)  # with its workers and writers
        assert set(life.end().values()) == {-signal.SIGKILL}, life.said
        assert life.left_behind() == []
        assert arguments is not prepare or not (data / MANIFEST).exists()
        ended = mmscale(*arguments, nproc=nproc)
        assert ended.status == 0, ended
    assert content(data) == content(digits)
    assert len(resumed(run)) == len(resumed(run / "auxiliary")) == 1, "one of them began anew"
    assert numbers(run) == numbers(tmp_path / "whole" / "tiny")


def _killed(make: Started) -> None:
    """All its processes, with -9, until none is left."""
    deadline = time.monotonic() + 60.0
    os.kill(make.process.pid, signal.SIGKILL)
    while found := make.processes():
        assert time.monotonic() < deadline, found
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.01)
    assert make.process.wait() == -signal.SIGKILL


@pytest.mark.long
@pytest.mark.skipif(REFERENCE is None, reason="needs minutes and an undisturbed quickstart: `make killed`")
def test_make_quickstart_killed_in_every_part(tmp_path: Path) -> None:
    """`make quickstart`, started four times, killed three times: the numbers of REFERENCE, from the same code."""
    assert REFERENCE is not None
    for name in ("Makefile", "configs", "constraints.txt", "examples", "pyproject.toml", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    data, run = tmp_path / "data" / "digits", tmp_path / "runs" / "quickstart"
    command = ["make", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.installed", "quickstart"]
    log = (tmp_path / "log").open("w")

    def begin() -> Started:
        mark = uuid.uuid4().hex
        environment = {**os.environ, "PYTHONPATH": str(ROOT), MARK: mark}
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=log, text=True, start_new_session=True
        )
        return Started(process, mark)

    moments: list[tuple[str, Callable[[], bool]]] = [
        ("in preparation", lambda: (data / "image_tokenizer").exists() and not (data / MANIFEST).exists()),
        ("in training", lambda: reached(run, 540)() and saved(run)),
        ("in the auxiliary stage", lambda: reached(run / "auxiliary", 120)() and saved(run / "auxiliary")),
    ]
    for name, moment in moments:
        make = begin()
        make.until(moment, timeout_s=1800.0)
        _killed(make)
        seen = {"main": read_metrics(run), "auxiliary": read_metrics(run / "auxiliary")}
        last = {stage: lines[-1]["step"] for stage, lines in seen.items() if lines}
        print(f"killed {name}: prepared {(data / MANIFEST).exists()}, last logged steps {last}", flush=True)
    ended = begin().end(timeout_s=1800.0)
    said = (tmp_path / "log").read_text()
    assert ended.status == 0, said
    print(said[said.rindex("data prepare") :])
    found, wanted = numbers(run), numbers(Path(REFERENCE))
    assert found == wanted
    after = {stage: resumed(run / stage) for stage in ("", "auxiliary")}
    assert [len(steps) for steps in after.values()] == [1, 1], "one of them began anew"
    print(f"went on after steps {after}")
    print(f"equal: {len(found['main'])} logged steps, {len(found['auxiliary'])} of the stage, its report")
