"""Choices of tokens that are recorded in one run and repeated in another."""

from __future__ import annotations

from pathlib import Path

import torch

from mmscale.model.capacity import Slots
from mmscale.model.choices import Choices
from mmscale.model.ranking import Ranking, by_sigmoid
from mmscale.model.routing import Selection, chosen_by, depth_choice, expert_choice


def _logits(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _choice(choices: Choices | None, logits: torch.Tensor, *, place: str = "text") -> Selection:
    """The choice of 4 of 16 tokens of each sequence, of which every third belongs to another group."""
    member = (torch.arange(16) % 3 > 0).unsqueeze(1).expand(16, 2)

    def choose(rank: Ranking) -> Selection:
        return expert_choice(logits, member, Slots(4), per_sequence=True, rank=rank)

    if choices is None:
        return choose(by_sigmoid)
    return choices.experts(choose, by_sigmoid, shape=logits.shape, micro_batch=7, place=place)


def test_experts_repeat_their_choice_with_the_gates_of_the_moment(tmp_path: Path) -> None:
    before, now = _logits(1, 16, 2, 3), _logits(2, 16, 2, 3)
    recorded = Choices(tmp_path / "kept", repeat=False)
    first = _choice(recorded, before)
    assert torch.equal(first.token, _choice(None, before).token)
    recorded.save()
    repeated = Choices(tmp_path / "kept", repeat=True)
    for _ in range(2):  # recompute comes by twice, and counts once
        found = _choice(repeated, now)
    taken, own = chosen_by(found, 32), chosen_by(_choice(None, now), 32)
    assert torch.equal(taken, chosen_by(first, 32))
    gates = torch.zeros(3, 32).scatter_(1, found.token, found.gate)
    assert torch.equal(gates, torch.sigmoid(now).reshape(32, 3).t() * taken.t())
    assert repeated.compared == int(taken.sum()) == 3 * 2 * 4
    assert repeated.differing == int((taken & ~own).sum()) > 0


def test_depth_layers_repeat_their_choice(tmp_path: Path) -> None:
    modality = torch.zeros(16, 2, dtype=torch.int8)
    first, now = (depth_choice(_logits(seed, 16, 2), modality, 5, None) for seed in (3, 4))
    recorded = Choices(tmp_path / "kept", repeat=False)
    assert torch.equal(recorded.depth(first, 16, micro_batch=0, place="depth"), first)
    recorded.save()
    repeated = Choices(tmp_path / "kept", repeat=True)
    assert torch.equal(repeated.depth(now, 16, micro_batch=0, place="depth"), first)
    same = sum(len(set(one) & set(other)) for one, other in zip(first.t().tolist(), now.t().tolist(), strict=True))
    assert (repeated.compared, repeated.differing) == (10, 10 - same)
