"""A run with loss-based weights through the commands: train, resume, changed settings, fine-tuning's settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmscale.checkpoint.layout import Store
from mmscale.runs.metrics import read_metrics
from mmscale.train.stages.sft_settings import stage_config
from tests.end_to_end.running import assert_says, mmscale, ok, undocumented

MAIN = (
    *("train.steps=8", "optim.warmup=2", "optim.schedule=constant", "train.eval_every=0", "log.every=1"),
    *("checkpoint.every=4", "checkpoint.asynchronous=false", "parallel.ep=1"),
)
WEIGHTS = ("train.loss_weights={warmup: 2, temperature: 0.5}",)
EXACT = ("loss", "grad_norm", "loss_weights/effective_share/text", "loss_weights/high/image")


@pytest.fixture(scope="module")
def run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weighted")
    ok("train", config, f"run.dir={folder}", *MAIN, *WEIGHTS)
    return folder / "tiny"


def test_figures_of_every_modality(run: Path) -> None:
    rows = read_metrics(run)
    assert all(0 < row["loss_weights/effective_share/text"] <= 1 for row in rows)
    assert rows[0]["loss_weights/effective_share/image"] == 1 and rows[-1]["loss_weights/effective_share/image"] < 1
    assert rows[-1]["loss_weights/low/image"] < rows[-1]["loss_weights/high/image"]
    assert undocumented(rows) == set()


def test_a_stopped_run_resumes_bit_by_bit(config: Path, run: Path, tmp_path: Path) -> None:
    """On the same layout; to rounding over two expert-parallel ranks."""
    whole = {row["step"]: row for row in read_metrics(run)}
    for name, layout, nproc in (("same", (), 1), ("ep2", ("parallel.ep=2",), 2)):
        folder = tmp_path / name
        ok("train", config, f"run.dir={folder}", *MAIN, *WEIGHTS, "train.steps=4")
        ok("train", config, f"run.dir={folder}", *MAIN, *WEIGHTS, *layout, nproc=nproc)
        for row in read_metrics(folder / "tiny"):
            for key in EXACT:
                wanted = whole[row["step"]][key]
                assert row[key] == (wanted if nproc == 1 else pytest.approx(wanted, rel=1e-5)), (name, key)


def test_changed_settings_are_shown_and_confirmed(config: Path, run: Path, tmp_path: Path) -> None:
    """The averages are kept when weights are changed, and begin anew when they were off before."""
    again = ("train", config, f"run.dir={tmp_path}", *MAIN)
    ok(*again, "train.steps=4")
    ended = mmscale(*again, *WEIGHTS)
    assert_says(ended, status=2, cause="train.loss_weights", remedy="--yes")
    ok(*again, *WEIGHTS, "train.steps=5", "--yes")
    assert Store.of_run(tmp_path / "tiny").newest() == 5
    ok(*again, "train.steps=6", "--yes")
    last = read_metrics(tmp_path / "tiny")[-1]
    assert last["step"] == 6 and not any(key.startswith("loss_weights/") for key in last)


def test_fine_tuning_does_not_use_them(config: Path) -> None:
    from mmscale.config.load import load

    settings = load(config, list(WEIGHTS))
    assert settings.train.loss_weights is not None and stage_config(settings).train.loss_weights is None
