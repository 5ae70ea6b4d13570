"""Which file `mmscale logs` shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import logs
from mmscale.errors import LaunchError


def test_ranks_that_were_started_in_place_are_found_in_the_folder_of_the_first_start(tmp_path: Path) -> None:
    """The newest attempt's folder has only what its ranks wrote when they hung."""
    (tmp_path / "logs" / "attempt_9").mkdir(parents=True)
    (tmp_path / "logs" / "attempt_9" / "rank_0.log").write_text("an earlier start\n")
    (tmp_path / "logs" / "attempt_10").mkdir()
    (tmp_path / "logs" / "attempt_10" / "rank_0.log").write_text("first start\nsecond start\n")
    (tmp_path / "logs" / "attempt_11" / "hang").mkdir(parents=True)
    assert list(logs.lines(tmp_path)) == ["first start\nsecond start\n"]
    assert list(logs.lines(tmp_path, attempt=9)) == ["an earlier start\n"]
    for missing in ({"attempt": 11}, {"rank": 7}):
        with pytest.raises(LaunchError, match="has no log of rank"):
            list(logs.lines(tmp_path, **missing))  # type: ignore[arg-type]
