"""Falling curves and their ratios, against power laws whose ratio is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmscale.report.equal_loss import SMOOTH_BINS, Bound, Falling, Ratio, matched, ratio_at

WORK = np.linspace(1e12, 1e15, 400)


def law(work: np.ndarray, speedup: float = 1.0) -> np.ndarray:
    """A loss that falls as of scaling laws, reached with 1/speedup of the work."""
    return 1.2 + 40.0 * (speedup * work) ** -0.1


def test_planted_ratio_at_every_level() -> None:
    dense, sparse = Falling(WORK, law(WORK)), Falling(WORK, law(WORK, 3.7))
    for share in (0.05, 0.25, 0.5, 1.0):
        ratio = ratio_at([dense], [sparse], dense.loss_at(share * dense.total))
        assert ratio is not None
        assert ratio.bound is Bound.NONE
        assert ratio.value == pytest.approx(3.7, rel=0.002)


def test_planted_ratio_through_noise() -> None:
    """Noise of a training loss, as large as what the curve falls over half of the run."""
    found = []
    for seed in range(20):
        random = np.random.default_rng(seed)
        curves = [
            Falling(WORK, law(WORK, speedup) + random.normal(0, 0.03, len(WORK)), bins=SMOOTH_BINS)
            for speedup in (1, 3)
        ]
        ratio = ratio_at(curves[:1], curves[1:], law(np.array([0.7e15]))[0])
        assert ratio is not None
        found.append(ratio.value)
    assert np.median(found) == pytest.approx(3.0, rel=0.03)
    assert np.std(np.log(found)) < 0.12


@settings(max_examples=60, deadline=None)
@given(
    losses=st.lists(st.floats(0.1, 10.0), min_size=3, max_size=40),
    bins=st.sampled_from([None, 4, 64]),
)
def test_any_points_make_a_falling_curve(losses: list[float], bins: int | None) -> None:
    work = np.arange(1.0, len(losses) + 1)
    curve = Falling(work, losses, bins=bins)
    levels = [curve.loss_at(place) for place in np.linspace(0.5, len(losses) + 1, 50)]
    assert all(earlier >= later - 1e-9 for earlier, later in itertools.pairwise(levels))
    assert min(losses) - 1e-9 <= curve.best <= curve.first <= max(losses) + 1e-9
    if bins is None:
        assert curve.best == min(losses)
    places = [curve.work_at(level) for level in np.linspace(curve.first, curve.best, 7)[1:-1]]
    if curve.first - curve.best > 1e-6:
        assert all(place is not None and curve.start * 0.999 <= place <= curve.end * 1.001 for place in places)
        assert curve.work_at(curve.best) == curve.end
    assert curve.work_at(curve.best - 1e-3) is None
    assert curve.work_at(curve.first + 1e-3) is None


def test_a_rise_after_the_lowest_point_takes_nothing_back() -> None:
    """Over-fitting: what was reached before the loss goes up again stays reached."""
    curve = Falling([1, 2, 4, 8], [3.0, 2.0, 2.2, 2.4])
    assert (curve.best, curve.end, curve.total) == (2.0, pytest.approx(2.0), pytest.approx(8.0))
    levelled = Falling([1, 2, 4, 8], [3.0, 2.2, 2.4, 2.0])  # a rise before it is averaged
    assert (levelled.loss_at(math.sqrt(8.0)), levelled.best) == (pytest.approx(2.3), 2.0)
    assert levelled.work_at(2.3) == pytest.approx(math.sqrt(8.0))
    lowest_first = Falling([1, 2, 4], [1.0, 2.0, 3.0])
    assert (lowest_first.best, lowest_first.work_at(1.0), lowest_first.loss_at(2.0)) == (1.0, pytest.approx(1.0), 1.0)


@pytest.mark.parametrize("bins", [None, 64])
def test_a_loss_that_was_reached_is_no_bound(bins: int | None) -> None:
    """The other model had 2.2 after work of 9, and rose; the baseline has it after 20."""
    baseline = Falling([5, 10, 20], [3.0, 2.5, 2.2], bins=bins)
    other = Falling([4, 6, 9, 14, 20], [3.0, 2.5, 2.2, 2.35, 2.3], bins=bins)
    assert ratio_at([baseline], [other], 2.2) == Ratio(pytest.approx(20 / 9))
    assert ratio_at([baseline], [other], 2.19) is None
    above = Falling([4, 6, 9, 14, 20], [3.0, 2.5, 2.21, 2.35, 2.3], bins=bins)
    assert ratio_at([baseline], [above], 2.2) == Ratio(pytest.approx(1.0), Bound.AT_MOST)


def test_a_plateau_of_noise_keeps_what_came_before() -> None:
    """The lowest of noisy points ends the curve; levels above the noise are where they are without it."""
    random = np.random.default_rng(0)
    loss = np.maximum(law(WORK), law(np.array([3e14]))[0])
    curve = Falling(WORK, loss + random.normal(0, 0.01, len(WORK)), bins=SMOOTH_BINS)
    assert loss.min() - 0.01 < curve.best < loss.min()  # bins at the end average about 40 points
    level = law(np.array([1e14]))[0]
    assert curve.work_at(level) == pytest.approx(1e14, rel=0.05)


def test_loss_that_one_never_reaches_is_a_bound() -> None:
    dense, sparse = Falling(WORK, law(WORK)), Falling(WORK, law(WORK, 3.7))
    ratio = ratio_at([dense], [sparse], sparse.best)
    assert ratio == Ratio(pytest.approx(1.0), Bound.AT_LEAST)
    assert str(ratio) == ">= 1.00"
    ratio = ratio_at([sparse], [dense], sparse.best)
    assert ratio == Ratio(pytest.approx(1.0), Bound.AT_MOST)
    assert ratio_at([dense], [sparse], 0.1) is None  # neither
    assert ratio_at([dense], [sparse], 99.0) is None  # both before they were looked at
    assert ratio_at([dense], [sparse], (sparse.first + dense.first) / 2) is None  # one of them


def test_seeds_give_a_spread() -> None:
    both = [Falling(np.tile(WORK, 2), np.concatenate([law(WORK, 2.0), law(WORK, 4.0)]))]
    sparse = both + [Falling(WORK, law(WORK, speedup)) for speedup in (2.0, 4.0)]
    dense = Falling(WORK, law(WORK))
    ratio = ratio_at([dense], sparse, dense.loss_at(0.5 * dense.total))
    assert ratio is not None
    assert 2.0 < ratio.value < 4.0
    assert (ratio.low, ratio.high, ratio.pairs) == (pytest.approx(2.0, rel=0.01), pytest.approx(4.0, rel=0.01), 2)
    assert str(ratio).endswith("(2.00 to 4.00)")
    # A seed that does not get there leaves the spread open on its side.
    lazy = Falling(WORK[:100], law(WORK[:100], 2.0))
    ratio = ratio_at([dense], [sparse[0], lazy, sparse[2]], dense.loss_at(0.9 * dense.total))
    assert ratio is not None
    assert (ratio.low, ratio.high, ratio.pairs) == (None, pytest.approx(4.0, rel=0.01), 2)
    assert str(ratio).endswith("(4.00 or less)")
    ratio = ratio_at(
        [dense, dense, Falling(WORK[:200], law(WORK[:200]))], sparse[1:2], dense.loss_at(0.9 * dense.total)
    )
    assert ratio is not None
    assert (ratio.low, ratio.high, ratio.pairs) == (pytest.approx(10 / 9, rel=0.02), None, 2)
    assert str(ratio).endswith("or more)")


def test_step_matching() -> None:
    dense, sparse = Falling(WORK, law(WORK)), Falling(WORK, law(WORK, 2.5))
    mine, theirs = matched(dense, sparse)
    assert np.allclose(mine / theirs, 2.5, rtol=0.02)
    assert mine.max() == pytest.approx(1e15)


def test_points_that_are_no_numbers() -> None:
    loss = law(WORK)
    loss[::7] = math.nan
    loss[3] = math.inf
    work = np.where(np.arange(len(WORK)) == 5, math.nan, WORK)
    curve = Falling(work, loss)
    assert curve.work_at(law(np.array([3e14]))[0]) == pytest.approx(3e14, rel=0.002)
    with pytest.raises(ValueError, match="2 points with work and loss, fewer than 3"):
        Falling([1, 2, 3, 0], [1.0, 2.0, math.nan, 4.0])
