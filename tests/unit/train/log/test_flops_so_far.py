# `flops` of metrics.jsonl when attempts differ in the FLOPs of a token.
"""Tests of the FLOPs of a run so far."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmscale.train.log.flops_so_far import FlopsSoFar
from mmscale.train.log.metrics_log import MetricsLog

TOKENS = 100  # of a step


def attempt(run: Path, number: int, steps: range, *, per_token: float, before: int = 0) -> list[float]:
    """FLOPs that an attempt logs; `before`: tokens before the run."""
    work, log, found = FlopsSoFar(run, per_token=per_token), MetricsLog(run, attempt=number), []
    for step in steps:
        tokens = before + step * TOKENS
        found.append(work.at(step, tokens=tokens, of_step=TOKENS))
        log.write(step, {"tokens": tokens, "flops": found[-1]})
    log.close()
    return found


@pytest.mark.parametrize("before", [0, 5000], ids=["scratch", "upcycled"])
def test_each_attempt_counts_its_own_tokens(before: int, tmp_path: Path) -> None:
    assert attempt(tmp_path, 1, range(1, 5), per_token=1.0, before=before) == [100, 200, 300, 400]
    assert attempt(tmp_path, 2, range(3, 5), per_token=3.0, before=before) == [500, 800], "it resumed after step 2"
    assert attempt(tmp_path, 3, range(4, 6), per_token=1.0, before=before) == [600, 700], "and again after step 3"


def test_steps_between_logged_ones_and_a_rollback(tmp_path: Path) -> None:
    work = FlopsSoFar(tmp_path, per_token=2.0)
    assert [work.at(step, tokens=step * 10, of_step=10) for step in (1, 10, 20, 11)] == [20, 200, 400, 220]


def test_lines_that_are_lost(tmp_path: Path) -> None:
    """As on a machine to which only checkpoints were fetched."""
    assert FlopsSoFar(tmp_path, per_token=2.0).at(7, tokens=70, of_step=10) == 140
    (tmp_path / "metrics.jsonl").write_text('{"step": 6, "attempt": 1, "tokens": 60}\n{"step": 6, "tok\n[]\n')
    assert FlopsSoFar(tmp_path, per_token=2.0).at(7, tokens=70, of_step=10) == 140
