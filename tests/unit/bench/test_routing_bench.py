"""`mmscale bench routing`: known values of random routers."""

from __future__ import annotations

import pytest

from mmscale.bench.routing import render, run
from mmscale.errors import UsageError


def test_random_routers() -> None:
    """E experts that each take 1 / E of the tokens at random leave (1 - 1/E)^E of them."""
    result = run(documents=400, seq_length=2048, micro_batch=2, micro_batches=6, seed=1)
    rows = {(row["capacity"], row["scope"], row["choice"]): row for row in result["rows"]}
    assert len(rows) == 12
    for scope in ("sequence", "micro_batch"):
        actual, nominal = rows["actual", scope, "sigmoid"], rows["nominal", scope, "sigmoid"]
        assert actual["unrouted"] == pytest.approx(0.75**4, abs=0.01)
        assert actual["slots_per_token"] == pytest.approx(1.0, abs=0.01) and actual["filled"] == 1.0
        assert nominal["filled"] <= actual["filled"]
        for choice in ("competitive", "softmax"):
            assert rows["actual", scope, choice]["unrouted"] < 0.2
    # A sequence of one modality has as many tokens as the whole, and slots for its share of them.
    assert rows["nominal", "sequence", "sigmoid"]["unrouted_single"] > 0.45
    assert rows["nominal", "sequence", "sigmoid"]["filled"] < 0.95
    assert rows["actual", "sequence", "sigmoid"]["unrouted_single"] == pytest.approx(0.75**4, abs=0.02)
    assert render(result).count("\n") == 13


def test_too_few_documents() -> None:
    with pytest.raises(UsageError, match="documents fill"):
        run(documents=20, seq_length=2048, micro_batch=4, micro_batches=100)
