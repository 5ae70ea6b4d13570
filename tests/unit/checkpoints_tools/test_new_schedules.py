# The settings of a new run that begins with another run's weights count steps from its own beginning.
"""Tests of schedules that `ckpt upcycle` and `ckpt fuse` give a new run."""

from __future__ import annotations

from typing import Any

import pytest

from checkpoints_tools.fused_settings import fused_settings
from checkpoints_tools.new_schedules import restarted
from checkpoints_tools.upcycled_settings import upcycled_settings
from mmscale.config import Config
from mmscale.config.derived import blend_phases
from tests.unit.data.samples import config

DONE = 60  # of 100 steps; a new run of another length may follow


def source(**sections: Any) -> Config:
    plain = config().model_dump(mode="json")
    dense = {"kind": "dense", "experts": {}}
    sections = {"train": {"steps": 100}, "model": dense, "data": {"path": "a"}} | sections
    plain["data"]["prepare"] = None
    return Config.model_validate(plain | {key: plain[key] | changed for key, changed in sections.items()})


def begun(how: str, old: Config, steps: int | None) -> Config:
    if how == "import":
        return restarted(old)
    if how == "fuse":
        return fused_settings(old, old, untie=True, steps=steps)
    return upcycled_settings(old, {"text": 2, "image": 2}, (), done=DONE, steps=steps)


@pytest.mark.parametrize(
    ("how", "steps"), [("upcycle", None), ("upcycle", 20), ("fuse", None), ("fuse", 20), ("import", None)]
)
def test_the_schedule_starts_again(how: str, steps: int | None) -> None:
    """A restart was of the source; phases that it had begun are over, and later ones come as many steps earlier."""
    phases = [{"start": 50, "lr": 1e-5}, {"start": 70, "lr": 2e-5}, {"start": 90, "lr": 3e-5}]
    new = begun(how, source(optim={"restart": 40, "warmup": 2, "phases": phases}), steps)
    assert new.optim.restart == 0 and new.optim.warmup == 2
    starts = {
        ("upcycle", None): [10, 30],
        ("upcycle", 20): [10],
        ("fuse", None): [50, 70, 90],
        ("fuse", 20): [],
        ("import", None): [50, 70, 90],
    }
    assert [phase.start for phase in new.optim.phases] == starts[how, steps]
    assert new.optim.span_at(1, new.train.steps).start == 0


@pytest.mark.parametrize("how", ["upcycle", "fuse", "import"])
def test_weights_of_data_go_on_from_where_the_source_was(how: str) -> None:
    blend = [{"path": "a", "weight": {0: 1.0, 50: 2.0, 80: 0.0}}, {"path": "b", "weight": 1.0}]
    new = begun(how, source(data={"blend": blend}), None)
    expected = {
        "upcycle": [(0, (2.0, 1.0)), (20, (0.0, 1.0))],
        "again": [(0, (1.0, 1.0)), (50, (2.0, 1.0)), (80, (0.0, 1.0))],
    }
    assert blend_phases(new) == expected.get(how, expected["again"])
