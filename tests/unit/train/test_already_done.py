"""A finished run with a mirror starts no job only to look at the mirror; one whose mirror may lack something does."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from mmscale.checkpoint.layout import Store
from mmscale.checkpoint.mirror.mirror_settings import MirrorSettings
from mmscale.checkpoint.mirror.uploads import Uploaded
from mmscale.config import Config
from mmscale.config.load import dump, resolve
from mmscale.runs.events import EventLog
from mmscale.train.already_done import already_done
from mmscale.train.stages.table import STAGES
from tests.unit.checkpoint.test_mirror import commit

MODEL = {"kind": "dense", "num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1}
# What was uploaded where before the run finished, and whether a start would do nothing.
CASES = {
    "no mirror": True,
    "up to date": True,
    "up to date after another mirror": True,
    "nothing": False,
    "not the newest": False,
    "to another mirror": False,
    "the newest is written again": False,
    "an attempt without a record of its mirror": False,
    "not finished": False,
}


def config(folder: Path, mirror: str | None) -> Config:
    found = {"mirror": None if mirror is None else f"file://{folder}/{mirror}", "mirror_keep": 2, "keep": 3}
    base = {"model": MODEL | {"seq_length": 32}, "data": {"path": "d"}, "train": {"steps": 12}, "checkpoint": found}
    return resolve({**base, "run": {"dir": str(folder / "runs"), "name": "one"}, "optim": {"warmup": 0}})


def attempt(run: Path, number: int, settings: Config, *, steps: tuple[int, ...], keep: int = 2) -> None:
    """An attempt that has these checkpoints, and uploads the newest ones of them to its mirror."""
    store, log = Store.of_run(run), EventLog(run, number)
    (run / f"config.{number}.yaml").write_text(dump(settings))
    (run / "config.yaml").write_text(dump(settings))
    log.add("start" if number == 1 else "resume", step=0)
    for step in steps:
        commit(store, step, attempt=number)
    mirror = MirrorSettings.of_stage(settings, run=run, folder=run)

    def uploaded(done: Uploaded) -> None:
        log.add("mirror_uploaded", **asdict(done))

    if mirror is not None and keep:
        mirror.uploader().bring_up_to_date(uploaded)


@pytest.mark.parametrize("case", CASES)
def test_a_finished_run(case: str, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    other, now = config(tmp_path, "other"), config(tmp_path, None if case == "no mirror" else "mirror")
    if case == "not the newest":
        attempt(run, 1, now, steps=(4, 8))
        attempt(run, 2, now, steps=(12,), keep=0)
    elif case == "up to date after another mirror":
        attempt(run, 1, other, steps=(4, 8))
        attempt(run, 2, now, steps=(12,))
    else:
        uploads = case != "nothing"
        attempt(run, 1, other if case == "to another mirror" else now, steps=(4, 8, 12), keep=2 * uploads)
    if case == "the newest is written again":
        commit(Store.of_run(run), 12, attempt=2, seed=1)
    if case == "an attempt without a record of its mirror":
        for file in run.glob("config*.yaml"):
            file.unlink()
    if case != "not finished":
        EventLog(run, 2).add("finish", step=12)
    said = already_done(STAGES["main"], now)
    assert bool(said) is CASES[case]
    assert not said or f"{run} is done: 12 of 12 steps" in said
    assert not already_done(
        STAGES["main"], now.model_copy(update={"train": now.train.model_copy(update={"steps": 13})})
    )
