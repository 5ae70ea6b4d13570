"""The exchange that travels while experts compute, and other ways to compute experts: what one process gets."""

from __future__ import annotations

from typing import Any

import pytest

from mmscale.config import Config
from mmscale.runtime import groups
from mmscale.runtime.rank_env import RankEnv
from tests.distributed.layouts import References, assert_equal, config, trace
from tests.support import run_ranks

CASES: dict[str, dict[str, Any]] = {
    "moe": {},
    "moma_depth": {"recompute": "full"},
    "moma_token_choice": {},
    "moma_post_per_expert_shared": {"overlap_grad_reduce": True, "overlap_param_gather": True},
}


def computed(settings: Config, **experts: Any) -> Config:
    """The same model whose experts are computed in another way."""
    model = settings.model
    changed = model.experts.model_copy(update=experts)
    return settings.model_copy(update={"model": model.model_copy(update={"experts": changed})})


SHORT = ("moe", "moma_depth")  # in `make test`


@pytest.mark.parametrize(
    "models",
    [SHORT, pytest.param(tuple(name for name in CASES if name not in SHORT), marks=pytest.mark.long)],
    ids=["", "more"],
)
def test_overlapped_exchange_equals_one_process(references: References, models: tuple[str, ...]) -> None:
    """And to the last bit what the exchange in one message gives."""
    expected = {model: references.get(config(model)) for model in models}

    def steps(ranks: RankEnv) -> None:
        groups.start(ranks)
        for model in models:
            parallel = CASES[model]
            found = trace(config(model, parallel={"ep": 2, "overlap_experts": True, **parallel}), ranks)
            assert_equal(expected[model], found, f"{model} {parallel}")
            if model == "moe":
                assert found == trace(config(model, parallel={"ep": 2}), ranks)
        groups.finalize()

    run_ranks(steps, world_size=2, timeout_s=600)


@pytest.mark.long
def test_other_computations_of_experts_equal_one_process(references: References) -> None:
    """`tests/unit/model/test_expert_compute.py` compares them in one process."""
    expected = references.get(config("moma"))

    def steps(ranks: RankEnv) -> None:
        groups.start(ranks)
        other = computed(config("moma", parallel={"ep": 2}), compute="grouped_mm", fused_swiglu=True)
        assert_equal(expected, trace(other, ranks), "grouped_mm, fused")
        groups.finalize()

    run_ranks(steps, world_size=2, timeout_s=600)
