"""What is a hang and what only takes long: evaluations and roll-backs under a short `resilience.hang_timeout`."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mmscale.checkpoint.manager import CheckpointManager
from mmscale.resilience import watchdog
from mmscale.resilience.inject import VARIABLE
from mmscale.runs.events import read_events
from mmscale.runs.metrics import read_metrics
from tests.end_to_end.running import mmscale
from tests.end_to_end.test_anomaly_policy import BAD, poison, unpredictable
from tests.end_to_end.test_anomaly_policy import SETTINGS as ROLLS_BACK

TIMEOUT_S, BATCHES = 5.0, 12
# The only evaluation follows the last step, so nothing was learned of how long it takes.
EVALUATES = (
    "parallel.ep=1",
    "train.steps=2",
    "train.eval_every=0",
    f"train.eval_batches={BATCHES}",
    "checkpoint.every=0",
    "optim.warmup=1",
    f"resilience.hang_timeout={TIMEOUT_S}s",
)


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_GRACE_S", 0.1)


@pytest.mark.long
def test_an_evaluation_that_takes_long_is_no_hang(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, f"0:2:eval:slow={TIMEOUT_S * 2 / BATCHES}")
    ended = mmscale("train", config, f"run.dir={tmp_path}", *EVALUATES)
    assert ended.status == 0, ended
    last, finish = read_metrics(tmp_path / "tiny")[-1], read_events(tmp_path / "tiny")[-1]
    assert finish["event"] == "finish" and "eval/loss" in last
    assert finish["time"] - last["time"] > 1.5 * TIMEOUT_S, "it was no long evaluation"
    assert watchdog.reports(tmp_path / "tiny" / "logs" / "attempt_1") == []


def test_an_evaluation_that_is_stuck_is_a_hang(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0:2:eval:hang")
    ended = mmscale("train", config, f"run.dir={tmp_path}", *EVALUATES)
    assert ended.status == watchdog.HUNG and "after step 2; stacks of rank 0" in ended.err, ended
    (report,) = watchdog.reports(tmp_path / "tiny" / "logs" / "attempt_1")
    assert report.step == 2 and any("evaluation.py" in line for line in report.stack)


@pytest.mark.long
def test_a_roll_back_that_takes_long_is_no_hang(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = CheckpointManager.choose

    def slowly(self: CheckpointManager) -> int | None:
        if self.store.steps():  # not where the run starts
            time.sleep(1.5 * TIMEOUT_S)
        return choose(self)

    monkeypatch.setattr(CheckpointManager, "choose", slowly)
    poison(monkeypatch, BAD, BAD, unpredictable)
    settings = (*ROLLS_BACK, "checkpoint.asynchronous=false", f"resilience.hang_timeout={TIMEOUT_S}s")
    ended = mmscale("train", config, f"run.dir={tmp_path}", *settings)
    assert ended.status == 0, ended
    (event,) = (event for event in read_events(tmp_path / "tiny") if event["event"] == "rollback")
    assert event["to"] == 16
    assert watchdog.reports(tmp_path / "tiny" / "logs" / "attempt_1") == []
