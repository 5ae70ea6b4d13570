"""Values that are computed from settings."""

from __future__ import annotations

from typing import Any

import pytest

from mmscale.config.derived import (
    batch_p2p,
    data_parallel_size,
    depth_tokens,
    expert_capacity,
    global_micro_batches,
    micro_batches_per_step,
    overlap_p2p,
    shared_width,
    tokens_per_step,
)
from tests.unit.config.test_rules import config


class TestDerived:
    def test_portions_of_a_batch(self) -> None:
        c = config(parallel__tp=2, parallel__pp=2, train__global_batch_size=24, train__micro_batch_size=2)
        assert data_parallel_size(c, 8) == 2
        assert global_micro_batches(c) == 12
        assert micro_batches_per_step(c, 8) == 6
        assert tokens_per_step(c) == 24 * 64

    @pytest.mark.parametrize(
        ("depth", "length", "expected"),
        [
            (None, 64, 64),
            ({"capacity": 0.25, "multiple": 8}, 64, 16),
            ({"capacity": 0.25, "multiple": 8}, 70, 24),
            ({"capacity": 0.01, "multiple": 8}, 64, 8),
            ({"capacity": 1.0, "multiple": 8}, 66, 66),
        ],
    )
    def test_depth_tokens(self, depth: dict[str, Any] | None, length: int, expected: int) -> None:
        assert depth_tokens(config(model__depth=depth, model__seq_length=length)) == expected

    @pytest.mark.parametrize(
        ("tokens", "share", "experts", "factor", "multiple", "expected"),
        [
            (64, 0.5, 4, 1.0, 1, 8),
            (64, 0.5, 4, 1.25, 1, 10),
            (64, 0.3, 4, 1.0, 1, 5),  # 4.8
            (64, 0.5, 4, 1.0, 16, 16),
            (8, 0.0, 4, 1.0, 1, 1),  # a modality without tokens keeps one slot: its experts stay in the graph
            (8, 1.0, 1, 4.0, 1, 8),  # no more than there are
            (10, 0.1 * 3, 3, 1.0, 1, 1),  # 0.1 * 3 is not quite 0.3
        ],
    )
    def test_expert_capacity(
        self, tokens: int, share: float, experts: int, factor: float, multiple: int, expected: int
    ) -> None:
        found = expert_capacity(tokens, share, experts, factor=factor, multiple=multiple, limit=tokens)
        assert found == expected

    def test_pipeline_sends_follow_interleaving(self) -> None:
        plain, interleaved = config(parallel__pp=2), config(parallel__pp=2, parallel__vpp=2)
        assert (overlap_p2p(plain), batch_p2p(plain)) == (False, True)
        assert (overlap_p2p(interleaved), batch_p2p(interleaved)) == (True, False)

    def test_shared_width(self) -> None:
        assert shared_width(config()) == 0
        assert shared_width(config(model__experts__shared=2)) == 2 * 96
        assert shared_width(config(model__experts__shared=2, model__experts__shared_ffn_hidden_size=10)) == 20
