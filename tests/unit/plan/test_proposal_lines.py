"""What `mmscale plan --data` says of a proposal in words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mmscale.cli import main
from mmscale.runtime import cpu_speed
from tests.unit.plan.test_sizing import documents


@pytest.mark.parametrize("budget", ["20s", "75s", "90s", "10m", "3h"])
def test_the_time_and_the_numbers_are_in_words_that_fit(
    budget: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not `1 minutes`, nor `0 minutes` for less than half of one."""
    monkeypatch.setattr(cpu_speed, "cores", lambda: 1)
    assert main(["plan", "--data", str(documents(tmp_path)), "--budget", budget]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if " of training, " in line)
    assert re.search(r", (\d+s|\d+m\d\ds|\d+h\d\dm) of training, ", line), line
    assert not re.search(r"(?<![\d.])[01] [a-z]+s\b", line) and "this machine, 1 core:" in line, line
