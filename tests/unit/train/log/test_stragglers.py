"""Ranks' own times as figures and on the log line; real ranks, one of them slow: tests/slurm/test_faults.py."""

from __future__ import annotations

from mmscale.train.log.progress_lines import line
from mmscale.train.log.stragglers import spread


def test_the_slowest_rank_and_by_how_much() -> None:
    found = spread([1.0, 1.1, 1.5, 1.05, 0.9])
    assert found == {"rank_time_median_s": 1.05, "rank_time_max_s": 1.5, "slowest_rank": 2}
    assert spread([1.0, 2.0])["rank_time_median_s"] == 1.0  # of two the other one


def test_the_log_line_names_it() -> None:
    assert "rank 2 +43%" in line(5, 10, {"loss": 1.0, **spread([1.0, 1.1, 1.5, 1.05, 0.9])})
    assert "rank" not in line(5, 10, {"loss": 1.0})
