"""Phases of the learning rate: each one is the schedule of a run of its own, at its place in the whole run."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmscale.config import OptimConfig
from mmscale.tables.settings import SCHEDULES
from mmscale.train.optim.schedule import learning_rate

ROOT = Path(__file__).parents[4]
STEPS = 90
GENERAL: dict[str, Any] = {"lr": 1e-3, "min_lr": 1e-5, "warmup": 5, "power_tokens": 20_000, "schedule": "linear"}
PHASE: dict[str, Any] = {"start": 60, "lr": 4e-4, "min_lr": 2e-6, "warmup": 3, "schedule": "cosine"}


def rates(settings: dict[str, Any], *, steps: int = STEPS, tokens: int = 0) -> list[float]:
    """The rate of each step; `tokens`: trained on before the first one."""
    config = OptimConfig.model_validate(settings)
    return [learning_rate(config, step=step, steps=steps, tokens=tokens + step * 1000) for step in range(1, steps + 1)]


@pytest.mark.parametrize(("first", "second"), list(itertools.product(SCHEDULES, repeat=2)))
def test_each_part_is_a_run_of_its_own(first: str, second: str) -> None:
    general = GENERAL | {"schedule": first}
    whole = rates(general | {"phases": [PHASE | {"schedule": second}]})
    own = {key: value for key, value in PHASE.items() if key != "start"} | {"schedule": second}
    assert whole[:60] == rates(general, steps=60)
    assert whole[60:] == rates(general | own, steps=30, tokens=60_000)


def test_a_phase_takes_over_what_it_does_not_set() -> None:
    whole = rates(GENERAL | {"phases": [{"start": 30}, {"start": 60, "lr": 5e-4}]})
    again = rates(GENERAL | {"warmup": 0}, steps=30)
    assert whole[:30] == rates(GENERAL, steps=30)
    assert whole[30:60] == again
    assert whole[60:] == rates(GENERAL | {"warmup": 0, "lr": 5e-4}, steps=30)


def test_a_restart_is_inside_the_part_before_the_first_phase() -> None:
    whole = rates(GENERAL | {"restart": 20, "phases": [PHASE]})
    assert whole[20:60] == rates(GENERAL, steps=40)
    assert whole[60:] == rates(GENERAL | {"phases": [PHASE]})[60:]


def test_a_later_phase_does_not_change_the_steps_before_it() -> None:
    """Phases can be added while a run is in its earlier ones."""
    added = rates(GENERAL | {"schedule": "constant", "phases": [PHASE]})
    assert added[:60] == rates(GENERAL | {"schedule": "constant"})[:60]


phases = st.lists(
    st.fixed_dictionaries(
        {"start": st.integers(5, STEPS - 1)},
        optional={
            "lr": st.floats(1e-4, 1e-2),
            "min_lr": st.floats(0, 1e-5),
            "schedule": st.sampled_from(list(SCHEDULES)),
            "warmup": st.integers(0, 3),
            "decay": st.integers(0, 3),
        },
    ),
    max_size=5,
    unique_by=lambda phase: phase["start"],
).map(lambda found: sorted(found, key=lambda phase: phase["start"]))


@given(phases)
def test_any_phases_give_rates_between_the_lowest_floor_and_the_highest_peak(found: list[dict[str, Any]]) -> None:
    peak = max(1e-3, *(phase.get("lr", 0.0) for phase in found), 1e-3)
    assert all(0.0 < rate <= peak * (1 + 1e-12) for rate in rates(GENERAL | {"phases": found}))


def test_a_plug_in_is_the_schedule_of_each_part_that_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "plugins"))
    general = GENERAL | {"schedule": "moma_plugins.schedule:OneCycle", "schedule_args": {"peak_at": 0.4}}
    whole = rates(general | {"phases": [{"start": 40, "lr": 5e-4}, PHASE]})
    assert whole[:40] == rates(general, steps=40)
    assert whole[40:60] == rates(general | {"warmup": 0, "lr": 5e-4}, steps=20)
    assert whole[60:] == rates(GENERAL | {"phases": [PHASE]})[60:]
