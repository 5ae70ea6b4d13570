"""Losses of `mmscale status` are those of the last logged step, and say so if the run has done more steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmscale.cli import main
from mmscale.runs.events import EventLog
from mmscale.train.log.metrics_log import MetricsLog


@pytest.mark.parametrize(("stopped", "shown"), [(24, "text 7.399 (step 1)"), (1, "text 7.399 ")])
def test_an_older_step_is_named(
    stopped: int, shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    metrics, events = MetricsLog(tmp_path, attempt=1), EventLog(tmp_path, 1)
    (tmp_path / "config.yaml").write_text("train: {steps: 120}\n")
    events.add("start", step=0)
    metrics.write(1, {"loss": 7.399, "loss/text": 7.399, "time": 1.0})
    events.add("stop", step=stopped)
    for log in (metrics, events):
        log.close()
    assert main(["status", str(tmp_path), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["step"], found["loss_step"]) == (stopped, 1)
    assert main(["status", str(tmp_path)]) == 0
    assert shown in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("stage", "shown"), [("auxiliary", "routers 0.412"), ("sft", "all 0.412"), ("", "all 0.412")])
def test_a_loss_without_modalities_is_shown(
    stage: str, shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The auxiliary stage logs the loss of routers only."""
    monkeypatch.setenv("COLUMNS", "300")
    (tmp_path / "config.yaml").write_text("train: {steps: 120}\n")
    run = tmp_path / stage
    metrics, events = MetricsLog(run, attempt=1), EventLog(run, 1)
    (run / "config.yaml").write_text("train: {steps: 120}\n")
    events.add("start", step=0)
    metrics.write(1, {"loss": 0.412, "time": 1.0})
    for log in (metrics, events):
        log.close()
    assert main(["status", str(run)]) == 0
    assert shown in " ".join(capsys.readouterr().out.split())
