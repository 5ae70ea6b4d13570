"""The benchmark for GPUs over Transformer-Engine's Python: every row runs, and its own checks pass."""

from __future__ import annotations

import pytest

from mmscale.runtime.rank_env import RankEnv
from tests.support import run_ranks
from tests.te_on_cpu.over_te import can_run  # noqa: F401  a fixture


def test_every_row_of_the_gpu_benchmark_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """And every check of its correctness part passes. Fewer variants, to save time: checks_gpu.py has all."""
    from mmscale.bench import gpu, gpu_checks, gpu_layers

    monkeypatch.setattr(gpu_layers, "VARIANTS", (("te", "off"), ("te", "delayed")))
    monkeypatch.setattr(gpu_checks, "RECIPES", ("tensorwise",))
    monkeypatch.setattr(gpu_checks, "FOLLOWED", 4)
    monkeypatch.setattr(gpu_checks, "TAIL", 2)
    monkeypatch.setattr(gpu_checks, "from_cpu", lambda: (0.0, "tests/gpu"))  # starts a process

    def one(ranks: RankEnv) -> None:
        del ranks
        result = gpu.run(device="cpu", tiny=True, repeats=1, steps=10)
        missing = [row["name"] + ": " + row["note"] for row in result["rows"] if row["ms"] is None]
        assert not missing
        assert {row["number"] for row in result["rows"]} == set(range(1, 8))
        assert {check["name"]: check["note"] for check in result["checks"] if not check["passed"]} == {}
        assert gpu.render(result).count("not measured") == 0

    run_ranks(one, world_size=1, timeout_s=300)
