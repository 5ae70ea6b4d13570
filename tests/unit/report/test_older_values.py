"""A value of a step before the last one is shown with its step: a modality that the last batches lack."""

from __future__ import annotations

from pathlib import Path

from mmscale.report.facts import losses, notes, results
from mmscale.report.history import read
from mmscale.train.log.metrics_log import MetricsLog

STEPS = 275
OLDER = 85


def run_of(folder: Path) -> Path:
    """The last batches have no audio."""
    log = MetricsLog(folder, attempt=1)
    for step in (OLDER, STEPS):
        values = {"loss": 2.0, "loss/text": 2.0, "experts/text/unrouted_fraction": 0.5}
        audio = {"loss/audio": 7.69834, "experts/audio/unrouted_fraction": 0.75} if step == OLDER else {}
        log.write(step, values | audio)
    log.close()
    return folder


def test_an_older_training_loss_has_its_step_in_tables_of_one_run_and_of_several(tmp_path: Path) -> None:
    history = read(run_of(tmp_path / "run"))
    assert losses(history)["training"] == {
        "loss per token": "2.0000",
        "loss per text token": "2.0000",
        "loss per audio token": f"7.6983, at step {OLDER}",
    }
    assert results(history)["loss per audio token, training"] == f"7.6983, at step {OLDER}"


def test_an_older_share_of_tokens_that_no_expert_took_has_its_step(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run")
    found = results(read(run))
    assert found["tokens of text that no expert took"] == "50.0%"
    assert found["tokens of audio that no expert took"] == f"75.0%, at step {OLDER}"
    said = [note for note in notes({"run": run}, {"run": read(run)}, {"run": {}}) if "experts take no part" in note]
    assert len(said) == 2
    assert said[0].startswith("run: at the last logged step, experts take no part in 50% of the tokens of text (")
    assert said[1].startswith(f"run: at step {OLDER}, experts take no part in 75% of the tokens of audio (")
