"""MoMa layers and whole models against the loops of reference.py: dense, moe and moma, every norm placement."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from megatron.core.models.gpt import GPTModel

from mmscale.config import Config, ExpertsConfig
from tests.unit.model.conftest import differences
from tests.unit.model.reference import SHARE, moma_experts, tiny, usual_batch

MODELS: dict[str, Config] = {
    "dense": tiny("dense"),
    "dense_post_gqa": tiny("dense", norm="post", num_query_groups=2),
    "dense_mqa_kv_channels": tiny("dense", num_query_groups=1, kv_channels=6),
    "moe": tiny("moe"),
    "moma": tiny(),
}


@pytest.mark.parametrize("name", MODELS)
def test_model_agrees(name: str, build: Callable[..., GPTModel]) -> None:
    config = MODELS[name]
    logits, grads = differences(build(config), config, usual_batch())
    print(name, logits, max(grads.values()))
    assert logits < 1e-5
    assert max(grads.values()) < 1e-5, grads
