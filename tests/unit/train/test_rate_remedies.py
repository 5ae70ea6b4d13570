"""Every remedy for a jump of the learning rate works as it is printed, whatever the user has tried before."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mmscale.checkpoint.layout import Store
from mmscale.errors import ConfigError
from mmscale.train import preflight
from tests.unit.config.test_changes import config
from tests.unit.train.test_preflight import commit

LONGER = "train.steps=2000"
TRIED = {
    "nothing": (),
    "a restart": ("optim.restart=1000",),
    "a short warm-up": ("optim.restart=1000", "optim.warmup=20"),
    "a restart somewhere else": ("optim.restart=900", "optim.warmup=20"),
}


def check(run: Path, *settings: str) -> None:
    preflight.check_changes(config(*settings), Store.of_run(run).info(1000), data=(), where="here", yes=False)


@pytest.mark.parametrize(
    ("tried", "phases"),
    [
        (tried, phases)
        for tried, given in TRIED.items()
        for phases in ("[]", "[{start: 950}]", "[{start: 950, warmup: 10}]")
        if phases == "[]" or "optim.restart=1000" not in given  # a restart behind the first phase is refused
    ],
)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_remedies_work_as_printed(tried: str, schedule: str, phases: str, tmp_path: Path) -> None:
    run, settings = tmp_path / "run", (f"optim.schedule={schedule}", "optim.min_lr=1e-6", "optim.warmup=10")
    settings = (*settings, f"optim.phases={phases}")
    commit(run, 1000, *settings)
    with pytest.raises(ConfigError, match="learning rate would jump") as raised:
        check(run, *settings, LONGER, *TRIED[tried])
    remedy = raised.value.remedy or ""
    ways = [found.split() for found in re.findall(r"\(([^)]*)\)", remedy)]
    assert len(ways) == 2 and "--yes" in remedy, remedy
    for way in ways:
        assert set(way) - {*settings, *TRIED[tried]}, f"{remedy}: nothing new"
        check(run, *settings, LONGER, *TRIED[tried], *way)


def test_no_warm_up_is_proposed_that_would_jump_as_well(tmp_path: Path) -> None:
    """A few more steps are too few for a slow one."""
    run, settings = tmp_path / "run", ("optim.schedule=linear", "optim.min_lr=1e-8", "optim.warmup=10")
    commit(run, 1000, *settings)
    with pytest.raises(ConfigError, match="learning rate would jump") as raised:
        check(run, *settings, "train.steps=1030", "optim.restart=1000", "optim.warmup=20")
    assert "warm up" not in (raised.value.remedy or "")
