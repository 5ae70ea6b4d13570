"""The anomaly policy on plain numbers: z-scores against SciPy, every decision, budgets, and what a checkpoint keeps."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mmscale.config import AnomalyConfig
from mmscale.resilience.anomaly import (
    AnomalyHistory,
    AnomalyKind,
    AnomalyPolicy,
    Finding,
    StepAction,
    StepDecision,
    robust_z,
)

WINDOW = 16


def policy(**settings: Any) -> AnomalyPolicy:
    return AnomalyPolicy(AnomalyConfig(window=WINDOW, **settings))


def usual(decider: AnomalyPolicy, history: AnomalyHistory, *, steps: int = WINDOW, seed: int = 0) -> None:
    """Steps at which nothing happens."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        figures = {
            "grad_norm": rng.lognormal(0.0, 0.1),
            "loss": rng.normal(3.0, 0.1),
            "loss/image": rng.normal(4.0, 0.1),
        }
        assert decider.judge(history, figures) == StepDecision(StepAction.APPLY)


# --- the detector ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 8, 127, 128])
def test_z_is_scipys(size: int) -> None:
    rng = np.random.default_rng(size)
    for scale in (1e-3, 1.0, 1e6):
        past = (scale * rng.standard_t(3, size)).tolist()  # heavy tails
        value = float(scale * rng.normal(0, 3))
        median = float(np.median(past))
        spread = max(float(stats.median_abs_deviation(past, scale="normal")), 0.01 * abs(median))
        found = robust_z(value, past)
        assert found == pytest.approx((median, (value - median) / spread), rel=1e-12)
        logs = np.log(np.abs(past))
        spread = max(float(stats.median_abs_deviation(logs, scale="normal")), math.log(1.01))
        found = robust_z(abs(value), np.abs(past).tolist(), logarithmic=True)
        expected = (math.exp(np.median(logs)), (math.log(abs(value)) - float(np.median(logs))) / spread)
        assert found == pytest.approx(expected, rel=1e-12)


def test_a_constant_series_has_no_spread() -> None:
    """One percent of the median counts as noise, so rounding is no spike; of a series of zeros all else is."""
    assert robust_z(2.0, [2.0] * 9) == (2.0, 0.0)
    assert robust_z(2.02, [2.0] * 9)[1] == pytest.approx(1.0)
    assert robust_z(-2.02, [-2.0] * 9)[1] == pytest.approx(-1.0)
    assert robust_z(0.0, [0.0] * 9) == (0.0, 0.0)
    assert robust_z(1e-9, [0.0] * 9) == (0.0, math.inf)
    assert robust_z(-1e-9, [0.0] * 9) == (0.0, -math.inf)
    assert robust_z(2.02, [2.0] * 9, logarithmic=True) == pytest.approx((2.0, 1.0))
    assert robust_z(0.0, [0.0] * 9, logarithmic=True)[1] == 0.0 < robust_z(1e-9, [0.0] * 9, logarithmic=True)[1]


def test_spikes_in_the_window_hide_no_further_ones() -> None:
    """A tenth of wild values moves median and MAD hardly; mean and standard deviation would call 10 usual."""
    rng = np.random.default_rng(1)
    past = [*rng.normal(3.0, 0.1, 115).tolist(), *[50.0] * 13]
    assert robust_z(10.0, past)[1] > 40
    assert (10.0 - np.mean(past)) / np.std(past) < 1


def test_normal_noise_gives_no_alarm_in_many_steps() -> None:
    """Six robust standard deviations over 128 steps: nothing in 10,000 steps of noise on a falling loss."""
    rng = np.random.default_rng(2)
    decider, history = AnomalyPolicy(AnomalyConfig()), AnomalyHistory()
    for step in range(10_000):
        figures = {"loss": 2.0 + 6.0 * math.exp(-step / 1000) + rng.normal(0, 0.05), "grad_norm": rng.lognormal(0, 0.3)}
        assert decider.judge(history, figures).findings == (), step


# --- decisions ------------------------------------------------------------------------------------------------------


def test_no_verdict_before_half_a_window_is_known() -> None:
    decider, history = policy(action="skip"), AnomalyHistory()
    usual(decider, history, steps=WINDOW // 2 - 1)
    assert decider.judge(history, {"loss": 1e9}).action is StepAction.APPLY
    assert decider.judge(history, {"loss": 1e9}).action is StepAction.SKIP  # 1e9 is one of eight


def test_a_series_is_judged_by_its_own_history() -> None:
    """A modality that comes now and then has had no steps to be usual in."""
    decider, history = policy(action="skip"), AnomalyHistory()
    usual(decider, history)
    assert decider.judge(history, {"loss": 3.0, "loss/audio": 1e9}).action is StepAction.APPLY
    assert decider.judge(history, {"loss": 3.0, "loss/image": 9.0}).action is StepAction.SKIP


def test_a_fall_is_no_spike() -> None:
    decider, history = policy(action="skip"), AnomalyHistory()
    usual(decider, history)
    assert decider.judge(history, {"loss": -1e9, "grad_norm": 0.0}) == StepDecision(StepAction.APPLY)


def test_a_logged_spike_is_applied_told_and_becomes_history() -> None:
    decider, history = policy(), AnomalyHistory()
    usual(decider, history)
    decision = decider.judge(history, {"grad_norm": 20.0, "loss": 3.0})
    assert decision.action is StepAction.APPLY
    ((finding),) = decision.findings
    assert (finding.kind, finding.name, finding.value) == (AnomalyKind.SPIKE, "grad_norm", 20.0)
    assert finding.z > 6 and finding.median == pytest.approx(1.0, abs=0.1)
    assert decision.reason.startswith("grad_norm 20 (median ")
    assert history.counts == {"spike": 1} and history.spent == 0
    assert history.series["grad_norm"][-1] == 20.0 and len(history.series["grad_norm"]) == WINDOW
    # A new level is the usual one after half a window.
    found = [bool(decider.judge(history, {"grad_norm": 20.0}).findings) for _ in range(WINDOW)]
    assert found[0] and not found[-1]


@pytest.mark.parametrize(("wanted", "action"), [("skip", StepAction.SKIP), ("rollback", StepAction.ROLL_BACK)])
def test_a_spike_is_not_applied_until_the_budget_is_spent(wanted: str, action: StepAction) -> None:
    decider, history = policy(action=wanted, budget=2), AnomalyHistory()
    usual(decider, history)
    series = json.dumps(history.series)
    spike = {"grad_norm": 1.0, "loss": 30.0, "loss/image": 40.0}
    assert [decider.judge(history, spike).action for _ in range(3)] == [action, action, StepAction.GIVE_UP]
    assert json.dumps(history.series) == series  # what is not applied is not usual
    assert history.counts == {"spike": 3, action.value: 2} and history.spent == 2
    assert decider.judge(history, {"grad_norm": 1.0, "loss": 3.0}).action is StepAction.APPLY


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("wanted", ["log", "skip", "rollback"])
def test_what_is_not_finite_is_replayed_once_and_then_left_out(bad: float, wanted: str) -> None:
    """Whatever spikes do: a NaN is never applied, not even before anything is usual."""
    decider, history = policy(action=wanted, budget=1), AnomalyHistory()
    figures = {"grad_norm": bad, "loss": 3.0}
    first = decider.judge(history, figures)
    assert repr(first) == repr(decider.judge(history, figures))  # from Python 3.13 on, a NaN in it equals nothing
    assert (first.action, [f.name for f in first.findings]) == (StepAction.REPLAY, ["grad_norm"])
    assert history == AnomalyHistory()  # nothing is decided yet
    assert decider.judge(history, figures, replayed=True).action is StepAction.SKIP
    assert decider.judge(history, figures, replayed=True).action is StepAction.GIVE_UP
    assert history.counts == {"nonfinite": 2, "skip": 1} and history.series == {}


@pytest.mark.parametrize("wanted", ["log", "skip", "rollback"])
def test_a_norm_above_the_limit_is_skipped_from_the_first_step_on(wanted: str) -> None:
    config = AnomalyConfig(window=WINDOW, action=wanted, budget=2)
    decider, history = AnomalyPolicy(config, largest_norm=5.0), AnomalyHistory()
    assert decider.judge(history, {"grad_norm": 5.0, "loss": 9.0}) == StepDecision(StepAction.APPLY)
    for _ in range(2):
        decision = decider.judge(history, {"grad_norm": 5.5, "loss": 3.0})
        assert decision.action is StepAction.SKIP
        assert decision.reason == "grad_norm 5.5 (above 5, grad_norm_skip_threshold)"
    assert decider.judge(history, {"grad_norm": 5.5}).action is StepAction.GIVE_UP
    assert history.counts == {"above_limit": 3, "skip": 2} and history.series["grad_norm"] == [5.0]
    assert decider.judge(history, {"grad_norm": math.nan}).action is StepAction.REPLAY  # NaN comes first
    assert decider.judge(history, {"loss": 1e9}).action is StepAction.APPLY


def test_a_fault_that_is_gone_costs_nothing_but_is_counted() -> None:
    decider, history = policy(action="skip", budget=0), AnomalyHistory()
    usual(decider, history)
    assert decider.judge(history, {"loss": math.nan}).action is StepAction.REPLAY
    assert decider.judge(history, {"loss": 3.0}, replayed=True) == StepDecision(StepAction.APPLY)
    assert history.counts == {"fault_transient": 1} and history.spent == 0
    # What comes out of the replay is looked at like any other step.
    assert decider.judge(history, {"loss": 30.0}, replayed=True).action is StepAction.GIVE_UP


def test_findings_in_words() -> None:
    assert str(Finding(AnomalyKind.SPIKE, "loss", 9.12345, 3.0, 12.34)) == "loss 9.123 (median 3, z 12.3)"
    assert str(Finding(AnomalyKind.NONFINITE, "grad_norm", math.nan)) == "grad_norm nan"


# --- history --------------------------------------------------------------------------------------------------------


def test_history_is_plain_data_and_decides_the_same_when_it_comes_back() -> None:
    decider, history = policy(action="skip"), AnomalyHistory()
    usual(decider, history)
    history.skip(8, 16)
    plain = history.plain()
    back = AnomalyHistory.of(json.loads(json.dumps(plain)))
    assert back == history
    usual(decider, history, seed=3)
    assert history.plain() != plain  # a copy
    usual(decider, back, seed=3)
    assert back == history
    assert AnomalyHistory.of(None) == AnomalyHistory() == AnomalyHistory.of({})


def test_a_shorter_window_forgets() -> None:
    """The configuration wins: of a longer history the newest part counts."""
    history = AnomalyHistory(series={"loss": [100.0] * 20 + [1.0] * 8})
    assert (
        AnomalyPolicy(AnomalyConfig(window=8, action="skip")).judge(history, {"loss": 50.0}).action is StepAction.SKIP
    )
    assert AnomalyPolicy(AnomalyConfig(window=8)).judge(history, {"loss": 1.0}).action is StepAction.APPLY
    assert history.series["loss"] == [1.0] * 8


def test_spans_that_meet_become_one_and_a_roll_back_covers_earlier_ones() -> None:
    history = AnomalyHistory()
    for start, end in ((8, 16), (16, 24), (40, 48)):
        history.skip(start, end)
    assert history.skipped == [[8, 24], [40, 48]]
    history.skip(32, 80)  # back to 32, on behind 80
    assert history.skipped == [[8, 24], [32, 80]]
    history.skip(20, 96)
    assert history.skipped == [[8, 96]]


def test_after_a_roll_back_the_past_is_usual_and_the_budget_stays_spent() -> None:
    older = AnomalyHistory(series={"loss": [3.0]}, counts={"spike": 1}, spent=1, skipped=[[0, 8]])
    now = AnomalyHistory(series={"loss": [3.0, 4.0]}, counts={"spike": 4}, spent=3, skipped=[[0, 8], [64, 72]])
    now.rolled_back_to(older, step=1)
    assert now == AnomalyHistory(series={"loss": [3.0]}, counts={"spike": 4}, spent=3, skipped=[[0, 8], [64, 72]])


def test_a_change_of_ones_own_is_no_spike() -> None:
    """Losses of other data or batches are not judged by those before, also after a roll-back to a step before."""
    policy, usual = AnomalyPolicy(AnomalyConfig(window=8, action="skip")), {"loss": [3.0, 3.01, 2.99, 3.0] * 2}
    history = AnomalyHistory(series=dict(usual), spent=1)
    assert policy.judge(history, {"loss": 5.0}).action is StepAction.SKIP
    history = AnomalyHistory(series=dict(usual), spent=1)
    history.begin_anew(step=8)
    assert policy.judge(history, {"loss": 5.0}).action is StepAction.APPLY and history.spent == 1
    history.rolled_back_to(AnomalyHistory(series=dict(usual)), step=8)
    assert history.series == {}
    history.rolled_back_to(AnomalyHistory(series={"loss": [5.0]}), step=9)
    assert history.series == {"loss": [5.0]}
    assert AnomalyHistory.of(history.plain()) == history
