"""`mmscale bench calibrate`: planted costs are found, and the measurement of a machine is what `plan` reads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from mmscale.bench import calibrate, calibrate_messages
from mmscale.bench.calibrate_messages import Messages
from mmscale.bench.calibrate_steps import FITTED, PREDICTED, config_of
from mmscale.errors import UsageError
from mmscale.plan import count_parameters
from mmscale.plan.measured import read
from mmscale.plan.timing import step_time
from mmscale.runtime import groups
from mmscale.tables.gpus import GPUS, Efficiency, Gpu
from tests.support import Ranks, distributed

# Costs of a CPU core with which every term of a step is at least a few percent of some of the fitted steps.
PLANTED = Efficiency(
    products=0.8,
    half_width=40.0,
    attention=0.1,
    attention_te=0.1,
    memory=1.0,
    moves=5.0,
    routed_moves=2.0,
    logits=60.0,
    adam=50.0,
    launch=2e-5,
    fixed=4e-3,
    link=1.0,
    network=1.0,
    latency=(1e-4, 1e-4),
)
HOST = dataclasses.replace(
    GPUS["a100"], name="a core", bf16=8e10, fp32=8e10, bandwidth=1e10, efficiency=PLANTED, host=True
)


def seconds_on(gpu: Gpu, shape: tuple[str, int, int, int, int, int]) -> float:
    config = config_of(shape)
    return step_time(config, 1, gpu, parameters=count_parameters(config)).total


def unfitted(gpu: Gpu) -> Gpu:
    """The device as `alone` returns it: only products, copies and messages are known."""
    for name in calibrate._UNITS:
        gpu = calibrate.without(gpu, name) if name != "products" else gpu
    return gpu


def test_planted_costs_are_found() -> None:
    """The time model is linear in what is fitted, so exact seconds give it back, and with it all other steps."""
    found = calibrate.fitted(
        unfitted(HOST), list(map(config_of, FITTED)), [seconds_on(HOST, shape) for shape in FITTED]
    )
    for name in calibrate._UNITS:
        assert getattr(found.efficiency, name) == pytest.approx(getattr(PLANTED, name), rel=1e-3), name
    for shape in PREDICTED:
        assert seconds_on(found, shape) == pytest.approx(seconds_on(HOST, shape), rel=1e-4)


def test_noise_of_five_percent_moves_predictions_by_less_than_ten() -> None:
    rng = np.random.default_rng(0)
    noisy = [seconds_on(HOST, shape) * (1 + 0.05 * rng.uniform(-1, 1)) for shape in FITTED]
    found = calibrate.fitted(unfitted(HOST), list(map(config_of, FITTED)), noisy)
    for shape in PREDICTED:
        assert seconds_on(found, shape) == pytest.approx(seconds_on(HOST, shape), rel=0.1), shape


def test_a_cost_that_would_be_negative_is_left_out() -> None:
    columns = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert calibrate.nonnegative(columns, np.array([1.0, -1.0, 0.5])).tolist() == pytest.approx([0.75, 0.0])
    assert calibrate.nonnegative(columns, -np.ones(3)).tolist() == [0.0, 0.0]


def test_rates_of_products_give_peak_and_half_width() -> None:
    sides = (64, 128, 256, 512)
    peak, half = calibrate.fit_rates(sides, [5e10 * side / (side + 100) for side in sides])
    assert (peak, half) == (pytest.approx(5e10), pytest.approx(100))
    peak, half = calibrate.fit_rates(sides, [5e10] * 4)
    assert (peak, half) == (pytest.approx(5e10), 1.0)


def test_a_measurement_is_what_plan_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real steps of this machine, three of the shapes; ranks are started by the test below."""
    monkeypatch.setattr(calibrate, "FITTED", FITTED[:1] + FITTED[5:6])
    monkeypatch.setattr(calibrate, "PREDICTED", PREDICTED[:1])
    monkeypatch.setattr(calibrate, "_COPIED", 1 << 22)
    file = tmp_path / "measured.json"
    result = calibrate.run(out=str(file), others=1, nproc=1, repeats=1)
    gpu = read(file)
    assert gpu.host and gpu.fp32 > 1e8 and gpu.bandwidth > 1e7 and gpu.memory > 0.5
    assert json.loads(file.read_text())["steps"] == result["steps"]
    assert [one["fitted"] for one in result["steps"]] == [True, True, False]
    assert all(one["seconds"] > 0 and one["predicted"] > 0 for one in result["steps"])
    last = result["steps"][-1]
    assert f"| dense | 3 | 96 | 256 x 4 | 1024 | no | {1e3 * last['seconds']:.1f} |" in calibrate.render(result)


@distributed(world_size=2)
def test_messages_between_ranks_are_timed(ranks: Ranks) -> None:
    groups.start(ranks)
    found = calibrate_messages.timed(ranks.world_size)
    assert found.latency > 0 and found.bandwidth > 1e5


@pytest.mark.long
def test_messages_between_started_ranks_are_measured() -> None:
    found = calibrate_messages.measure(2)
    assert isinstance(found, Messages) and found.latency > 0 and found.bandwidth > 1e5


def test_a_folder_that_is_not_there_is_refused_before_measuring(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no folder") as raised:
        calibrate.run(out=str(tmp_path / "no" / "measured.json"))
    assert raised.value.remedy
