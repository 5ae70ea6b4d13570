"""Configurations that break no rule, and those that break one only on so many ranks."""

from __future__ import annotations

from typing import Any

import pytest

from mmscale.config.rules import check
from mmscale.errors import ConfigError
from tests.unit.config.test_rules import DENSE, RING, config

BROKEN_FOR_RANKS = [
    ({"parallel__tp": 2, "parallel__pp": 2}, 6, "parallel.tp * pp = 2 * 2 = 4 does not divide the 6 ranks"),
    (
        {"parallel__tp": 2, "parallel__cp": 2, "data__document_multiple": 4},
        6,
        "parallel.tp * pp * cp = 2 * 1 * 2 = 4 does not divide the 6 ranks",
    ),
    ({"parallel__ep": 4}, 2, "parallel.ep = 4 does not divide the 2 data-parallel ranks"),
    (
        {"train__global_batch_size": 8, "train__micro_batch_size": 2},
        8,
        "train.micro_batch_size * data-parallel ranks = 2 * 8 = 16",
    ),
    (
        {"parallel__pp": 2, "parallel__vpp": 2, "train__global_batch_size": 3},
        2,
        "runs micro-batches in rounds of parallel.pp = 2; 3 per step is not divisible",
    ),
]

FINE = [
    {},
    DENSE,
    {**DENSE, "model__depth": {}},
    {"model__kind": "moe", "model__experts": {"counts": {"mixed": 8}, "shared": 1}},
    {"model__norm": "post_per_expert", "model__experts__noise": "gumbel"},
    {"parallel__tp": 4, "parallel__ep": 4, "model__depth": {"multiple": 8}},
    RING,
    {"parallel__cp_attention": "ring", "model__depth": {"multiple": 8}},  # without effect for cp = 1
    {"parallel__cp": 2, "data__document_multiple": 4, "parallel__tp": 2, "parallel__overlap_tensor": True},
    {"parallel__pp": 2, "parallel__vpp": 2},
    {"parallel__pp": 2, "parallel__vpp": 2, "parallel__overlap_p2p": False, "parallel__batch_p2p": False},
    {"parallel__pp": 4, "parallel__vpp": 2, "parallel__overlap_p2p": False},  # two neighbours: batching is right
    {"parallel__pp": 2, "model__tie_embeddings": True},
    {"optim__moments": "fp8_coat", "optim__beta2": 0.999, "resilience__memory_every": 1},
    {"optim__moments": "bf16", "optim__beta2": 0.995, "auxiliary__optim__moments": "te_fp8"},
    {"auxiliary__optim__moments": "te_fp8", "resilience__memory_every": 1},  # the stage keeps no copies
    {"model__experts": {"counts": {"text": 1, "image": 1}, "capacity_factor": 1.5}},
    {"data__prepare": {"documents": ["a"], "image": {"kind": "kmeans", "size": 8, "patch": 2}}},
    {"data__prepare": {"source": "digits", "augment": 4, "image": {"size": 8}}},  # as older runs were set
    {"data__prepare": {"source": "emoji", "emoji": {"languages": ["en"]}, "image": {"size": 8}}},
    {"data__prepare": {"documents": ["a"], "image": {"kind": "vq", "path": "model"}}},
]


@pytest.mark.parametrize("changes", FINE)
def test_fine(changes: dict[str, Any]) -> None:
    check(config(**changes))


@pytest.mark.parametrize(("changes", "ranks", "cause"), BROKEN_FOR_RANKS)
def test_broken_for_so_many_ranks(changes: dict[str, Any], ranks: int, cause: str) -> None:
    check(config(**changes))
    with pytest.raises(ConfigError) as caught:
        check(config(**changes), world_size=ranks)
    assert cause in caught.value.cause
    assert caught.value.remedy
