"""Ranks that train hold their run: seen by a second start of several ranks, by `status`, and by `stop`."""

from __future__ import annotations

from pathlib import Path

from launch import control, status
from mmscale.checkpoint.layout import Store
from mmscale.resilience import lease
from mmscale.runs.events import read_events
from mmscale.runs.metrics import read_metrics
from tests.end_to_end.lives import Life
from tests.end_to_end.running import mmscale


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
