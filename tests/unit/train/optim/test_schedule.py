"""Learning-rate schedules: closed formulas, and the corners where one piece ends and the next begins."""

from __future__ import annotations

import itertools
import math

import pytest

from mmscale.config import OptimConfig
from mmscale.train.optim.schedule import learning_rate

SCHEDULES = ("constant", "linear", "cosine", "wsd", "inverse_sqrt", "power")
PEAK, FLOOR, WARMUP, STEPS = 1e-3, 1e-5, 10, 110


def rates(schedule: str, *, steps: int = STEPS, tokens_per_step: int = 1000, **optim: object) -> list[float]:
    """The rate of every step; entry 0 is step 1."""
    settings: dict[str, object] = {"lr": PEAK, "min_lr": FLOOR, "warmup": WARMUP, "power_tokens": 20_000, **optim}
    config = OptimConfig.model_validate({"schedule": schedule, **settings})
    return [
        learning_rate(config, step=step, steps=steps, tokens=step * tokens_per_step) for step in range(1, steps + 1)
    ]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_linear_and_ends_at_the_peak(schedule: str) -> None:
    assert rates(schedule)[:WARMUP] == pytest.approx([PEAK * step / WARMUP for step in range(1, WARMUP + 1)])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_first_step_learns(schedule: str) -> None:
    """A rate of 0 at step 1 would waste the batch, with and without warm-up."""
    assert rates(schedule)[0] > 0
    assert rates(schedule, warmup=0)[0] == pytest.approx(PEAK, rel=0.02)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_never_above_the_peak_nor_below_the_floor_and_never_rising_after_warm_up(schedule: str) -> None:
    after = rates(schedule)[WARMUP - 1 :]
    assert max(after) <= PEAK * (1 + 1e-12)
    assert min(after) >= FLOOR * (1 - 1e-12)
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(after))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd", "power"])
def test_reaches_the_floor_after_the_last_step_and_stays_there(schedule: str) -> None:
    """A last step at a floor of 0 would be computed for nothing."""
    assert rates(schedule, min_lr=0.0)[-1] > 0
    config = OptimConfig.model_validate({"schedule": schedule, "lr": PEAK, "min_lr": FLOOR, "warmup": WARMUP})
    # The run is over, but a schedule that goes up or below zero behind its end has bitten others.
    for step in (STEPS + 1, STEPS + 5):
        assert learning_rate(config, step=step, steps=STEPS, tokens=1) == pytest.approx(FLOOR)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_that_is_all_warm_up(schedule: str) -> None:
    assert rates(schedule, steps=10, warmup=10, decay=0) == pytest.approx([PEAK * s / 10 for s in range(1, 11)])


def test_constant() -> None:
    assert set(rates("constant")[WARMUP:]) == {PEAK}


def test_linear() -> None:
    expected = [PEAK + (FLOOR - PEAK) * (step - WARMUP) / (STEPS - WARMUP + 1) for step in range(WARMUP + 1, STEPS + 1)]
    assert rates("linear")[WARMUP:] == pytest.approx(expected)


def test_cosine() -> None:
    found = rates("cosine")
    assert rates("cosine", steps=STEPS - 1)[WARMUP + 49] == pytest.approx((PEAK + FLOOR) / 2)  # half-way
    expected = [
        FLOOR + (PEAK - FLOOR) * math.cos(math.pi / 2 * (step - WARMUP) / (STEPS - WARMUP + 1)) ** 2
        for step in range(WARMUP + 1, STEPS + 1)
    ]
    assert found[WARMUP:] == pytest.approx(expected)


def test_inverse_sqrt() -> None:
    found = rates("inverse_sqrt", steps=1000)
    assert found[4 * WARMUP - 1] == pytest.approx(PEAK / 2)
    assert found[WARMUP:] == pytest.approx([max(FLOOR, PEAK * (WARMUP / s) ** 0.5) for s in range(WARMUP + 1, 1001)])


@pytest.mark.parametrize(("decay", "length"), [(None, 11), (30, 30), (1, 1)])
def test_wsd_holds_the_peak_and_then_falls_linearly(decay: int | None, length: int) -> None:
    found = rates("wsd", decay=decay)
    assert set(found[WARMUP : STEPS - length]) == {PEAK}
    falling = [FLOOR + (PEAK - FLOOR) * (length + 1 - past) / (length + 1) for past in range(1, length + 1)]
    assert found[STEPS - length :] == pytest.approx(falling)


def test_wsd_without_decay_never_falls() -> None:
    assert set(rates("wsd", decay=0)[WARMUP:]) == {PEAK}


def test_wsd_that_decays_from_the_end_of_warm_up_on() -> None:
    assert rates("wsd", decay=STEPS - WARMUP)[WARMUP:] == pytest.approx(rates("linear")[WARMUP:])


def test_power_follows_the_tokens_and_then_decays() -> None:
    found = rates("power", decay=20, power_exponent=-0.51)
    stable = [min(PEAK, PEAK * (step * 1000 / 20_000) ** -0.51) for step in range(WARMUP + 1, STEPS + 1)]
    assert found[WARMUP : STEPS - 20] == pytest.approx(stable[:-20])
    assert stable[0] == PEAK and stable[-21] < PEAK / 2
    falling = [FLOOR + (stable[past - 21] - FLOOR) * (21 - past) / 21 for past in range(1, 21)]
    assert found[STEPS - 20 :] == pytest.approx(falling)


def test_power_does_not_depend_on_how_tokens_are_cut_into_steps() -> None:
    """What the power scheduler is for: the rate is one of tokens, not of steps or batch sizes (arXiv 2408.13359)."""
    small = rates("power", warmup=0, decay=0, steps=100, tokens_per_step=1000)
    large = rates("power", warmup=0, decay=0, steps=50, tokens_per_step=2000)
    assert large == pytest.approx(small[1::2])


def test_power_without_decay_never_goes_below_the_floor() -> None:
    found = rates("power", decay=0, min_lr=5e-4, steps=2000)
    assert found[-1] == 5e-4


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_begins_anew(schedule: str) -> None:
    """As one of a run that had only the steps behind `restart`; power goes on counting tokens."""
    first = rates(schedule, steps=300, restart=300 - STEPS, power_tokens=1e9)
    assert first[300 - STEPS :] == rates(schedule, power_tokens=1e9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_min_lr_equal_to_lr_is_constant(schedule: str) -> None:
    assert rates(schedule, min_lr=PEAK)[WARMUP:] == pytest.approx([PEAK] * (STEPS - WARMUP))
