"""Figures of gradients by which a step is judged: those of megatron-core, and of all ranks."""

from __future__ import annotations

import pytest

from mmscale.data.vocab import Vocabulary
from mmscale.runtime import groups as process_groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.steps.batch import to_device
from mmscale.train.steps.step import mean_losses, reduce_sums
from tests.distributed.test_anomalies import Stream, build, with_policy
from tests.distributed.test_resume import settings, start
from tests.support import distributed


@distributed(world_size=2)
def test_figures_are_those_of_megatron_and_of_all_ranks(ranks: RankEnv) -> None:
    """Norm: as megatron-core's own. Losses: as the sums over ranks, on every stage. Without labels: no figure."""
    start(ranks)
    for parallel in ({}, {"tp": 2}, {"pp": 2}, {"ep": 2}):
        made = with_policy(settings("moma", parallel=parallel), steps=1)
        parts, _ = build(made)
        vocabulary = Vocabulary.from_config(made.vocab)
        batches = [to_device(part, vocabulary) for part in next(Stream(made, parts, 0)).micro_batches]
        result = parts.stepper.compute(batches)
        assert not result.applied
        assert result.grad_norm == pytest.approx(float(parts.optimizer.get_grad_norm()), rel=1e-6)
        expected = mean_losses(reduce_sums(result.sums, parts.groups), made.vocab.names)
        assert result.losses == pytest.approx(expected, rel=1e-12) and "loss/image" in expected
        assert set(result.figures) == {"grad_norm", "loss", "loss/text", "loss/image"}
        process_groups.destroy_layout()
    process_groups.finalize()
