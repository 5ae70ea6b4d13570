# Columns are what read_metrics makes of the same file, however it is torn and repeated; curves keep every extreme.
"""Tests of mmscale.report.history, downsample, axes and layers."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from mmscale.report import layers
from mmscale.report.axes import axes_of, clock_of, first_time
from mmscale.report.downsample import Downsampler
from mmscale.report.history import read
from mmscale.report.layers import layers_of
from mmscale.runs.metrics import read_metrics
from mmscale.train.log.metrics_log import MetricsLog


def as_records(run: Path, **options: int) -> list[dict[str, float]]:
    history = read(run, **options)
    found = []
    for row, step in enumerate(history.steps):
        values = {key: column[row] for key, column in history.columns.items() if not math.isnan(column[row])}
        found.append({"step": int(step), **values})
    return found


def expected(run: Path) -> list[dict[str, float]]:
    """read_metrics; a NaN that was measured counts as infinite, as nothing else can be drawn of it."""
    records = read_metrics(run)
    return [{key: math.inf if value != value else value for key, value in record.items()} for record in records]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("part", [97, 64 << 20])
def test_columns_are_the_records(seed: int, part: int, tmp_path: Path) -> None:
    """Attempts, roll-backs, held-out lines, torn lines, NaN; also read in parts."""
    draw = random.Random(seed)
    step = 0
    for attempt in (1, 2, 3):
        log = MetricsLog(tmp_path, attempt=attempt)
        step = max(0, step - draw.randrange(6))
        for _ in range(12):
            step += 1
            if draw.random() < 0.15:
                log.rolled_back(log.rollback + 1)
                step = max(1, step - draw.randrange(3))
            values = {"loss": draw.random(), "b": draw.choice([1.0, math.nan, math.inf]), "c": draw.choice([None, 2.0])}
            log.write(step, values)
            if draw.random() < 0.3:
                log.write(step, {"eval/loss": draw.random(), "eval/causal/loss": 1.0})
        log.close()
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(draw.choice(['{"step": 9, "att', "[1, 2]\n", '{"loss": 1.0}\n', "\n", '{"step": 1e3}\n']))
    found = as_records(tmp_path, part=part)
    assert found == expected(tmp_path)
    assert len(found) > 10


def test_an_empty_file_and_none(tmp_path: Path) -> None:
    assert len(read(tmp_path)) == 0
    (tmp_path / "metrics.jsonl").write_text("")
    assert len(read(tmp_path)) == 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lo')
    assert (len(read(tmp_path)), read(tmp_path).torn) == (0, 1)


def test_words_where_numbers_should_be(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": "high", "lr": 0.5, "list": [1], "none": null}\n')
    (record,) = as_records(tmp_path)
    assert (record["step"], record["lr"]) == (1, 0.5)


def test_every_extreme_survives_downsampling() -> None:
    values = np.random.default_rng(0).normal(size=10_007)
    values[[13, 5000, 10_006]] = [50.0, -50.0, 99.0]
    values[777], values[4000:4100] = np.inf, np.nan
    steps = np.arange(10_007.0)
    curve = Downsampler({"step": steps}, points=100).curve(values)
    assert curve is not None and len(curve.mean) == 100
    finite = values[np.isfinite(values)]
    assert (curve.low.min(), curve.high.max()) == (finite.min(), finite.max())
    assert list(curve.at["step"][curve.high > 40]) == pytest.approx([49.0, 9957.0], abs=60)
    # Row 777 is in the eighth of 100 bins of 99 measured rows; bins cover all rows once.
    assert list(curve.broken) == [7]
    sizes = np.diff(np.unique(np.linspace(0, 9907, 101).astype(int)))
    sizes[7] -= 1
    assert float((curve.mean * sizes).sum()) == pytest.approx(finite.sum())


def test_few_points_are_left_as_they_are() -> None:
    column = np.array([1.0, math.nan, 3.0, math.inf])
    curve = Downsampler({"step": np.arange(4.0)}).curve(column)
    assert curve is not None and curve.exact
    assert list(curve.at["step"]) == [0, 2, 3]
    assert list(curve.mean[:2]) == [1.0, 3.0] and math.isnan(curve.mean[2]) and list(curve.broken) == [2]
    assert Downsampler({"step": np.arange(4.0)}).curve(np.full(4, np.nan)) is None


def test_the_clock_of_lines_without_times(tmp_path: Path) -> None:
    """Step times and pauses are summed up from each attempt's start."""
    events = [
        {"time": 1000.0, "attempt": 1, "event": "start", "step": 0},
        {"time": 2000.0, "attempt": 2, "event": "resume", "step": 20},
    ]
    first, second = MetricsLog(tmp_path, attempt=1), MetricsLog(tmp_path, attempt=2)
    for step in (10, 20, 30):
        first.write(step, {"step_time_s": 2.0, "tokens": 7 * step, "save_stall_s": 5.0 if step == 20 else None})
    second.write(30, {"step_time_s": 1.0, "tokens": 210})
    history = read(tmp_path)
    clock = clock_of(history, events)
    axes = axes_of(tmp_path, history, clock=clock, begin=first_time(events, clock=clock))
    assert axes["hours"] * 3600 == pytest.approx([20, 45, 1010])
    assert list(axes["tokens"]) == [70, 140, 210]
    assert np.isnan(axes["flops"]).all()  # there is no configuration to count them from


def test_layers_of_a_long_file_are_spread_over_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "RECORDS", 11)
    log = MetricsLog(tmp_path, attempt=1)
    for step in range(1, 1001):
        log.write_layers(step, {"1": {"output_norm": {"text": step / 7}}})
    found = layers_of(tmp_path)
    assert found[0]["step"] == 1 and found[-1]["step"] == 1000
    assert np.diff([record["step"] for record in found]) == pytest.approx([100] * 10, abs=12)
    second = MetricsLog(tmp_path, attempt=2)
    for step in range(501, 700):
        second.write_layers(step, {"1": {"output_norm": {"text": step * 1000.0}}})
    found = layers_of(tmp_path)
    assert found[-1]["step"] == 699
    assert [record["attempt"] for record in found] == sorted(record["attempt"] for record in found)
    with (tmp_path / "layers.jsonl").open("a") as file:
        file.write(json.dumps({"step": 700, "attempt": 2, "layers": {"1": {}}})[:-5])
    assert layers_of(tmp_path)[-1]["step"] <= 699
    monkeypatch.setattr(layers, "RECORDS", 5000)
    assert len(layers_of(tmp_path)) == 699
    assert layers_of(tmp_path / "none") == []


def test_co_selection_is_left_out_of_some_records_before_records_are(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, attempt=1)
    for step in range(1, 41):
        pairs = [[1.0] * 20] * 20
        experts = {"text": {"text": {"unrouted": 0.5, "load": [0.1], "coselection": pairs}}}
        log.write_layers(step, {"1": {"experts": experts, "output_norm": {"text": 2.0}}})
    whole, few = layers_of(tmp_path, limit=10**6), layers_of(tmp_path, limit=20_000)
    assert len(whole) == len(few) == 40
    has = [int("coselection" in record["layers"]["1"]["experts"]["text"]["text"]) for record in few]
    assert (has[0], has[-1]) == (1, 1) and 4 < sum(has) < 12
    assert len(json.dumps(few)) < 25_000
    assert few[1]["layers"]["1"]["output_norm"] == {"text": 2.0}
    assert few[1]["layers"]["1"]["experts"]["text"]["text"] == {"unrouted": 0.5, "load": [0.1]}


def test_records_without_co_selection_that_are_too_large(tmp_path: Path) -> None:
    """The first is small, so that as many are read as there may be; then there is nothing to leave out of them."""
    log = MetricsLog(tmp_path, attempt=1)
    log.write_layers(1, {"1": {"output_norm": {"text": 1.0}}})
    for step in range(2, 10):
        log.write_layers(step, {str(layer): {"output_norm": {"text": 2.0}} for layer in range(1, 40)})
    found = layers_of(tmp_path, limit=2000)
    assert len(json.dumps(found)) > 2000  # all of what was read
    assert found[-1]["layers"]["39"] == {"output_norm": {"text": 2.0}}


def test_layers_are_counted_from_0_also_those_of_earlier_versions(tmp_path: Path) -> None:
    """Their files counted from 1, and a run of theirs goes on in the same file."""
    figures = {"output_norm": {"text": 1.0}}
    old = {"step": 1, "attempt": 1, "layers": {"1": figures, "2": {}}}
    (tmp_path / "layers.jsonl").write_text(json.dumps(old) + "\n")
    log = MetricsLog(tmp_path, attempt=2)
    log.write_layers(2, {"0": figures, "1": {}})
    log.close()
    with (tmp_path / "layers.jsonl").open("a") as file:
        file.write(json.dumps(old | {"step": 3, "layers": {"9" * 7: {}}}) + "\n")
    assert [record["layers"] for record in layers_of(tmp_path)] == 2 * [{"0": figures, "1": {}}]


def test_numbers_that_name_something_have_no_mean() -> None:
    ranks = np.array([0.0, 7.0, 7.0, 3.0, 0.0, 3.0, math.inf, 5.0, 5.0, math.nan])
    curve = Downsampler({"step": np.arange(10.0)}, points=3).curve(ranks, names=True)
    assert curve is not None
    assert list(curve.mean) == list(curve.low) == list(curve.high) == [7.0, 3.0, 5.0]
    assert list(curve.broken) == [2]
    even = Downsampler({"step": np.arange(2.0)}, points=1).curve(np.array([7.0, 0.0]), names=True)
    assert even is not None and list(even.mean) == [0.0]  # and not 3.5
