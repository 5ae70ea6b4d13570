"""The exchange that travels while experts compute, and other ways to compute experts: what one process gets."""

from __future__ import annotations

from typing import Any

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


def test_overlapped_exchange_equals_one_process(references: References) -> None:
    """And to the last bit what the exchange in one message gives."""
    expected = {model: references.get(config(model)) for model in (*CASES, "moma")}

    def steps(ranks: RankEnv) -> None:
        groups.start(ranks)
        for model, parallel in CASES.items():
            found = trace(config(model, parallel={"ep": 2, "overlap_experts": True, **parallel}), ranks)
            assert_equal(expected[model], found, f"{model} {parallel}")
            if model == "moe":
                assert found == trace(config(model, parallel={"ep": 2}), ranks)
        other = computed(config("moma", parallel={"ep": 2}), compute="grouped_mm", fused_swiglu=True)
        assert_equal(expected["moma"], trace(other, ranks), "grouped_mm, fused")
        groups.finalize()

    run_ranks(steps, world_size=2, timeout_s=600)
