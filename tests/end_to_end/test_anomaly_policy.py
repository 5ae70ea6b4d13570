"""What a user sees of the anomaly policy: a roll-back in the logs and on the terminal, kill -9 after it, exit status 5.

Bad data comes out of the real loader: labels that nothing predicts (a spike), or a loss mask with NaN in it.
"""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmscale.data.stream.loader import StepBatch
from mmscale.data.stream.micro_batch import MicroBatch
from mmscale.data.stream.mixture import Mixture
from mmscale.runs.events import read_events
from mmscale.runs.metrics import METRICS, read_metrics
from mmscale.train.hooks import LogHook
from mmscale.train.loop import Trainer
from mmscale.train.state.train_state import TrainState
from mmscale.train.steps.step_report import StepReport
from tests.end_to_end.running import assert_says, mmscale

STEPS, SAVE, BAD = 24, 8, 19  # of two micro-batches with two sequences each
SETTINGS = (
    "parallel.ep=1",
    f"train.steps={STEPS}",
    "train.eval_every=0",
    "train.eval_batches=1",
    f"checkpoint.every={SAVE}",
    "optim.warmup=2",
    "resilience.anomaly.window=16",
    "resilience.anomaly.threshold=20",
    "resilience.anomaly.action=rollback",
    "resilience.anomaly.skip_window=2",
)
EXACT = ("tokens", "loss", "loss/text", "loss/image", "z_loss", "grad_norm", "lr", "output_norm")


def unpredictable(batch: MicroBatch) -> MicroBatch:
    """One label everywhere, which the data never has."""
    return replace(batch, labels=np.where(batch.loss_mask > 0, 383, batch.labels))


def unusable(batch: MicroBatch) -> MicroBatch:
    return replace(batch, loss_mask=batch.loss_mask * np.float32(math.nan))


def poison(monkeypatch: pytest.MonkeyPatch, first: int, last: int, how: Any) -> None:
    """The micro-batches of steps `first` to `last`."""
    read = Mixture.micro_batch

    def micro_batch(self: Mixture, index: int) -> MicroBatch:
        bad = first <= index // 2 + 1 <= last and not self.once
        return how(read(self, index)) if bad else read(self, index)

    monkeypatch.setattr(Mixture, "micro_batch", micro_batch)


@pytest.mark.long
def test_a_roll_back_is_told_and_survives_kill_9(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not asynchronous: which save is still under way when the next is due, and left out, depends on the machine's load.
    settings = (*SETTINGS, "checkpoint.asynchronous=false")
    poison(monkeypatch, BAD, BAD, unpredictable)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ended = mmscale("train", config, f"run.dir={whole}", *settings)
    assert ended.status == 0, ended

    # On the terminal, in the events, in the metrics.
    (warning,) = (line for line in ended.err.splitlines() if "warning" in line)
    assert (
        f"step {BAD}: " in warning and "back to the checkpoint of step 16, sequences 64 to 76 are left out" in warning
    )
    (event,) = (e for e in read_events(whole / "tiny") if e["event"] == "rollback")
    assert (event["step"], event["to"], event["sequences"]) == (BAD, 16, [64, 76])
    assert event["reason"].startswith("grad_norm ") and event["grad_norm"] > 3
    raw = [json.loads(line) for line in (whole / "tiny" / METRICS).read_text().splitlines()]
    times = {step: [line.get("rollback", 0) for line in raw if line["step"] == step] for step in (16, 17, 18, 19)}
    assert times == {16: [0], 17: [0, 1], 18: [0, 1], 19: [1]}
    lines = read_metrics(whole / "tiny")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["anomalies"] for line in lines] == [0] * 16 + [1] * 8
    assert lines[-1]["anomalies/spike"] == lines[-1]["anomalies/rollback"] == 1
    assert all(line["loss"] < 7 for line in lines[4:])
    assert "rollback_s" in lines[16]

    # Killed two steps after it, before anything was saved: the next attempt rolls back again, to the same numbers.
    log = LogHook.on_step

    def on_step(self: LogHook, state: TrainState, report: StepReport) -> None:
        log(self, state, report)
        if report.step == BAD + 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as only_here:
        only_here.setattr(LogHook, "on_step", on_step)
        assert mmscale("train", config, f"run.dir={killed}", *settings).status == -signal.SIGKILL
    assert [e["event"] for e in read_events(killed / "tiny")][-1] == "rollback"
    ended = mmscale("train", config, f"run.dir={killed}", *settings)
    assert ended.status == 0 and "resumes after step 16" in ended.err, ended
    again = read_metrics(killed / "tiny")
    assert [{key: line.get(key) for key in EXACT} for line in again] == [
        {key: line.get(key) for key in EXACT} for line in lines
    ]
    assert {line["attempt"] for line in again} == {1, 2} and again[-1]["anomalies/rollback"] == 1


@pytest.mark.long
@pytest.mark.parametrize("changed", [True, False])
def test_a_change_of_ones_own_is_no_spike(
    changed: bool, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses rise where a run is resumed. With another batch size they are not compared; without, it is a spike."""
    settings = (*SETTINGS, "checkpoint.asynchronous=false", "optim.schedule=constant", f"run.dir={tmp_path}")
    ended = mmscale("train", config, *settings, "train.steps=16")
    assert ended.status == 0, ended
    poison(monkeypatch, 0, 10**9, unpredictable)
    more = ("train.micro_batch_size=1",) if changed else ("resilience.anomaly.budget=9",)
    ended = mmscale("train", config, *settings, "train.steps=18", *more)
    found = [
        event["event"] for event in read_events(tmp_path / "tiny") if event["event"] in ("spike", "rollback", "skip")
    ]
    if changed:
        assert ended.status == 0 and found == [], (ended, found)
    else:
        assert found, ended


def test_nothing_but_bad_data_ends_with_status_5(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches are left out, the third ends it; weights with NaN are never saved, and mended data goes on."""
    settings = (*SETTINGS, "train.steps=6", "checkpoint.every=2", "resilience.anomaly.budget=2")
    with monkeypatch.context() as only_here:
        poison(only_here, 4, 10**9, unusable)
        ended = mmscale("train", config, f"run.dir={tmp_path}", *settings)
    assert_says(ended, status=5, cause=r"step 4: .*nan.*computed again.*budget of 2", remedy="events.jsonl names")
    events = read_events(tmp_path / "tiny")
    skips = [event for event in events if event["event"] == "skip"]
    assert [event["sequences"] for event in skips] == [[12, 16], [16, 20]]
    assert all(event["step"] == 4 and event["grad_norm"] == "nan" for event in skips)
    assert events[-1]["event"] == "fault" and events[-1]["error"] == "TrainingError"
    assert [line["step"] for line in read_metrics(tmp_path / "tiny")] == [1, 2, 3]
    ended = mmscale("train", config, f"run.dir={tmp_path}", *settings)
    assert ended.status == 0 and "resumes after step 2 of 6" in ended.err, ended
    assert all(math.isfinite(line["loss"]) for line in read_metrics(tmp_path / "tiny"))


def test_a_rank_that_diverged_is_named(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of one norm on rank 1, in step 4: found there, before that step is saved. Two ranks: both named."""
    advance = Trainer._advance

    def flip(self: Trainer, batch: StepBatch) -> None:
        advance(self, batch)
        if self.state.step == 4 and torch.distributed.get_rank() == 1:
            (norm,) = (p for n, p in self.stepper.chunks[0].named_parameters() if n.endswith("final_layernorm.weight"))
            norm.data.view(torch.int32)[0] ^= 1

    settings = ("train.steps=6", "train.eval_every=0", "checkpoint.every=2", "resilience.parameter_hash_every=2")
    with monkeypatch.context() as only_here:
        only_here.setattr(Trainer, "_advance", flip)
        ended = mmscale("train", config, f"run.dir={tmp_path}", *settings, nproc=2)
    cause = "step 4: parameters differ from their replicas on one of these, .*: rank 0 on .*, rank 1 on"
    assert_says(ended, status=5, cause=cause, remedy="without that node")
    told = [event for event in read_events(tmp_path / "tiny") if event["event"] == "diverged_rank"]
    assert [(event["rank"], event["certain"], event["step"]) for event in told] == [(0, False, 4), (1, False, 4)]
    assert told[0]["parameters"][0].endswith("final_layernorm.weight") and told[0]["parameters_total"] == 1
    ended = mmscale("train", config, f"run.dir={tmp_path}", *settings, nproc=2)
    assert ended.status == 0 and "resumes after step 2 of 6" in ended.err, ended
