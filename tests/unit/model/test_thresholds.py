"""Thresholds of auxiliary routers and averaged cut-offs: calibrated, followed, collected."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from megatron.core.models.gpt import GPTModel

from mmscale.model.auxiliary import BINS, calibrated
from mmscale.model.capacity import Slots
from mmscale.model.thresholds import Cutoffs, Thresholds, cutoffs, move
from mmscale.tables.routings import Routing
from tests.unit.model.comparison import params_of, run_layer
from tests.unit.model.reference import (
    depth,
    usual_batch,
)
from tests.unit.model.test_auxiliary import with_routers


def test_calibrated_thresholds_give_as_many_tokens_as_the_true_choice() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(3, 1000, generator=generator)
    scores[2] = scores[2] ** 8  # most of them near 0
    taken = torch.tensor([250, 3, 400])
    bins = (scores * BINS).long()
    histogram = torch.stack([torch.bincount(row, minlength=BINS) for row in bins])
    thresholds = calibrated(histogram, taken)
    above = (scores > thresholds.unsqueeze(1)).sum(dim=1)
    assert ((above - taken).abs() <= torch.tensor([2, 2, 25])).all(), above  # the last bins hold many scores
    assert calibrated(histogram, torch.zeros(3, dtype=torch.int64)).tolist() == [1.0, 1.0, 1.0]
    assert (scores >= calibrated(histogram, torch.full((3,), 1000)).unsqueeze(1)).all()


@pytest.mark.parametrize("per_sequence", [True, False])
@pytest.mark.parametrize("capacity", [1, 3, 12])
def test_cutoffs_lie_between_the_last_taken_and_the_first_left(capacity: int, per_sequence: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(12, 4, 3, generator=generator)
    member = torch.rand(12, 4, generator=generator) < 0.5
    member[:, 2] = False  # a sequence without the modality
    found = cutoffs(logits, member, Slots(capacity), per_sequence=per_sequence)
    columns = [(logits[:, b], member[:, b]) for b in range(4)]
    if not per_sequence:
        columns = [(logits.reshape(-1, 3), member.reshape(-1))]
    wanted, number = [0.0] * 3, 0
    for values, own in columns:
        if not own.any():
            continue
        number += 1
        for expert in range(3):
            ordered = sorted((float(v) for v, m in zip(values[:, expert], own, strict=True) if m), reverse=True)
            taken, left = ordered[:capacity], ordered[capacity:]
            wanted[expert] += (taken[-1] + (left[0] if left else taken[-1])) / 2
    assert found.tolist() == pytest.approx([*wanted, number], rel=1e-6)


def test_thresholds_follow_cutoffs_and_rest_without_any() -> None:
    threshold = torch.tensor([0.5, -1.0])
    move(threshold, torch.tensor([2.0, 4.0, 2.0], dtype=torch.float64), decay=0.75)
    assert threshold.tolist() == pytest.approx([0.75 * 0.5 + 0.25 * 1.0, -0.75 + 0.25 * 2.0])
    before = threshold.clone()
    move(threshold, torch.zeros(3, dtype=torch.float64), decay=0.75)
    assert torch.equal(threshold, before)


def test_training_collects_cutoffs_once_per_choice(build: Callable[..., GPTModel]) -> None:
    """Also under full recompute, which shows every choice twice."""
    seen = {}
    for recompute in ("none", "full"):
        model, batch = build(with_routers(depth=depth(), recompute=recompute)).train(), usual_batch()
        collected = Cutoffs()
        params = params_of(batch)
        params.cutoffs = collected
        model(batch.ids, batch.position, None, packed_seq_params=params).sum().backward()
        assert collected.sums.keys() == {(1, "depth"), *((n, g) for n in (1, 2) for g in ("text", "image"))}
        buffers = {id(b) for m in model.modules() if isinstance(m, Thresholds) for b in m.buffers()}
        assert {id(threshold) for threshold, _ in collected.sums.values()} == buffers
        seen[recompute] = {key: sums for key, (_, sums) in collected.sums.items()}
    assert all(torch.equal(sums, seen["full"][key]) for key, sums in seen["none"].items())


def test_a_layer_that_decides_for_no_token_passes_all_through(build: Callable[..., GPTModel]) -> None:
    model = build(with_routers(depth=depth())).eval()
    for name, buffer in model.named_buffers():
        if name.endswith(".threshold"):
            buffer.fill_(1.0)
    batch = usual_batch()
    hidden = torch.randn(12, batch.ids.shape[0], 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(run_layer(model, 0, hidden, params_of(batch, routing=Routing.CAUSAL)), hidden)
        out, _ = model.decoder.layers[1].mlp(hidden, padding_mask=params_of(batch, routing=Routing.CAUSAL))
    assert float(out.abs().max()) == 0.0
