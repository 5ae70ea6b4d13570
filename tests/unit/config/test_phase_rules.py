"""Phases of the learning rate: what is refused, and what is noted."""

from __future__ import annotations

from typing import Any

import pytest
from changed import changed
from test_notes import BASE

from mmscale.config.notes import notes, unused
from mmscale.config.rules import violations

STEPS = 90
PHASE: dict[str, Any] = {"start": 60, "lr": 4e-4, "min_lr": 2e-6, "warmup": 3, "schedule": "cosine"}


@pytest.mark.parametrize("section", ["optim", "auxiliary.optim", "sft.optim"])
@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"phases": [{"start": 60}, {"start": 60}]}, "phases.1.start = 60 is not above the phase before it, 60"),
        ({"phases": [{"start": 90}]}, "phases.0.start = 90 is not below"),
        ({"phases": [{"start": 60}], "restart": 70}, "restart = 70 is not below the start of the first phase, 60"),
        ({"phases": [{"start": 60}], "warmup": 61}, "warmup = 61 steps is more than the 60 before the first phase"),
        ({"phases": [{"start": 60, "warmup": 31}]}, "phases.0.warmup = 31 steps is more than the 30 of the phase"),
        ({"phases": [{"start": 60, "lr": 1e-3, "min_lr": 2e-3}]}, "phases.0.min_lr = 0.002 is above"),
        (
            {"phases": [{"start": 60, "schedule": "wsd", "warmup": 10, "decay": 21}]},
            "phases.0.warmup + SECTION.phases.0.decay = 10 + 21 steps is more than the 30 of the phase",
        ),
    ],
)
def test_phases_that_do_not_fit_are_refused(section: str, settings: dict[str, Any], cause: str) -> None:
    owner = section.rpartition(".")[0] or "train"
    values = {f"{owner}__steps": STEPS} | {
        f"{section.replace('.', '__')}__{key}": value for key, value in settings.items()
    }
    found = [str(problem) for problem in violations(changed(BASE, values))]
    assert any(cause.replace("SECTION", section) in problem for problem in found), found


def test_a_setting_that_only_a_phase_reads_is_not_unused() -> None:
    settings = {"optim__schedule": "constant", "optim__min_lr": 1e-5, "train__steps": STEPS}
    config = changed(BASE, settings)
    assert any("optim.min_lr" in note for note in unused(config))
    config = changed(BASE, settings | {"optim__phases": [PHASE]})
    assert not any("optim.min_lr" in note for note in unused(config))


@pytest.mark.parametrize(("start", "noted"), [(60, False), (50, True)])
def test_a_phase_beside_the_change_of_the_blend_is_noted(start: int, noted: bool) -> None:
    blend = [{"path": "a", "weight": {0: 1.0, 60: 0.5}}, {"path": "b", "weight": {0: 0.0, 60: 0.5}}]
    settings = {"data__blend": blend, "optim__phases": [{"start": start}], "train__steps": STEPS}
    found = notes(changed(BASE, settings))
    assert any("where no weight of data.blend changes (it does at 60)" in note for note in found) is noted
