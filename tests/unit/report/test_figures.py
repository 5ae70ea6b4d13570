# Figures are written, whole and with the right series; how they look is for eyes.
"""Tests of mmscale.report."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from matplotlib.figure import Figure

from mmscale.errors import UsageError
from mmscale.report import figure_style, figures
from mmscale.runs.events import EventLog
from mmscale.train.log.metrics_log import MetricsLog


def make_run(folder: Path, *, steps: int = 5) -> Path:
    log = MetricsLog(folder, attempt=1)
    for step in range(1, steps + 1):
        losses = {"loss": 3.0 / step, "loss/text": 2.0 / step, "loss/image": 4.0 / step}
        log.write(step, {**losses, "grad_norm": math.inf if step == 2 else 1.0, "lr": 1e-4, "tokens_per_second": 1e4})
    log.write(steps, {"eval/loss/text": 2.5, "eval/loss/image": 3.5})
    EventLog(folder, 1).add("fault", rank=1)
    return folder


def size(file: Path) -> tuple[int, int]:
    with PIL.Image.open(file) as image:
        image.load()
        return image.size


def test_loss_curves(tmp_path: Path) -> None:
    short, long = make_run(tmp_path / "short"), make_run(tmp_path / "long", steps=300)
    figures.loss_curves([short, long], tmp_path / "out" / "two.png")
    assert size(tmp_path / "out" / "two.png") == (1500, 1080)
    figures.loss_curves([short], tmp_path / "again.png")
    figures.loss_curves([short], tmp_path / "once.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "once.png").read_bytes()


def test_the_line_of_a_long_run_is_its_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 40th of 20,000 losses is a spike: the line stays at the mean, and the band reaches the spikes."""
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "metrics.jsonl").open("w") as file:
        for step in range(1, 20_001):
            file.write(f'{{"step": {step}, "attempt": 1, "loss": {42.0 if step % 40 == 0 else 1.0}}}\n')
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, _: drawn.append(figure))
    figures.loss_curves([tmp_path / "run"], tmp_path / "x.png")
    axes = drawn[0].axes[0]
    (line,) = [one for one in axes.lines if one.get_label() == "loss"]
    values = np.asarray(line.get_ydata(), dtype=float)
    assert len(values) == 2000
    assert values[100:-100] == pytest.approx(1.0 + 41.0 / 40, abs=0.15)  # of each point's lowest and highest: 6.1
    (band,) = axes.collections
    assert band.get_datalim(axes.transData).ymax == 42.0


def test_curves_of_a_run_that_measured_little(tmp_path: Path) -> None:
    MetricsLog(tmp_path / "run", attempt=1).write(1, {"loss": math.nan})
    figures.loss_curves([tmp_path / "run"], tmp_path / "run.png")
    assert size(tmp_path / "run.png") == (1500, 1080)


def test_run_without_metrics(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no metrics\.jsonl with a logged step"):
        figures.loss_curves([tmp_path], tmp_path / "x.png")


def test_run_names(tmp_path: Path) -> None:
    a, b = tmp_path / "x" / "run", tmp_path / "y" / "run"
    assert figures.run_names([a]) == ["run"]
    assert figures.run_names([a, b]) == [str(a), str(b)]
    assert figures.run_names([a, a]) == [f"{a} (1)", f"{a} (2)"]


def test_running_mean_is_centred_and_skips_gaps() -> None:
    line = np.arange(100.0)
    assert np.allclose(figures.running_mean(line, span=4)[:96], line[:96])  # no lag
    line[50] = np.nan
    assert figures.running_mean(line, span=1)[50] == pytest.approx(50.0)
    assert np.isnan(figures.running_mean(np.full(3, np.nan), span=1)).all()


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 3)])
def test_sample_rows(tmp_path: Path, shape: tuple[int, ...]) -> None:
    white, black = np.full(shape, 255, np.uint8), np.zeros(shape, np.uint8)
    figures.sample_rows([("one", [white, black, white]), ("two", [black])], tmp_path / "rows.png")
    with PIL.Image.open(tmp_path / "rows.png") as image:
        pixels = np.asarray(image.convert("L")).astype(int)
    upper = pixels[len(pixels) // 4]
    # From right to left: white, black, white cells.
    cell = round(0.62 * 150)
    assert [upper[-(15 + cell * n + cell // 2)] for n in range(3)] == [255, 0, 255]


def test_sample_rows_of_unit_range_and_of_nothing(tmp_path: Path) -> None:
    figures.sample_rows([("grey", [np.full((4, 4), 0.5)])], tmp_path / "grey.png")
    figures.sample_rows([], tmp_path / "none.png")
    assert size(tmp_path / "none.png")


@pytest.mark.parametrize(
    ("value", "label"),
    [(0.0, "0"), (2.5e-3, "2.5e-3"), (3e-3, "3e-3"), (-1e-4, "-1e-4"), (9.96e-3, "1e-2"), (0.5, "0.5"), (15e3, "15k")],
)
def test_tick_labels_tell_ticks_apart(value: float, label: str) -> None:
    assert figure_style.engineering(value, 0) == label


@pytest.mark.parametrize(
    ("hours", "shown"),
    [(0.01, (36.0, "seconds")), (0.04, (2.4, "minutes")), (50.0, (50.0, "hours")), (240.0, (10.0, "days"))],
)
def test_times_have_the_unit_that_fits(hours: float, shown: tuple[float, str]) -> None:
    factor, unit = figure_style.clock_unit(hours)
    assert (pytest.approx(hours * factor), unit) == shown


@pytest.mark.parametrize("steps", [3, 60, 1200])
def test_ticks_are_at_round_whole_steps(steps: int) -> None:
    axes = figure_style.new_figure(width=8.0, height=3.0).add_subplot()
    axes.plot([1, steps], [0.0, 1.0])
    figure_style.whole_steps(axes)
    (distance,) = {round(float(gap), 6) for gap in np.diff(axes.get_xticks())}
    assert distance % 1 == 0 and str(int(distance)).rstrip("0") in ("1", "2", "5")
