"""The loss in chunks equals the loss of whole logits: values, gradients, and what is kept for backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmscale.runtime import groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.steps.chunked_loss import chunked_cross_entropy
from mmscale.train.steps.loss import Objective, cross_entropy
from tests.support import distributed
from tests.unit.train.steps.test_loss import ALONE, B, S, V

H = 16
OBJECTIVE = Objective(2, (0.5, 2.0), 0.3)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and weight with gradients; labels, their modality, mask."""
    rng = torch.Generator().manual_seed(3)
    hidden = torch.randn(B, S, H, generator=rng).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=rng).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (B, S), generator=rng)
    mask = (torch.rand(B, S, generator=rng) > 0.3).float()
    return hidden, weight, labels, (labels >= V // 2).to(torch.int8), mask


@pytest.mark.parametrize("chunk", [1, 5, B * S - 1, B * S, 10 * B * S])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_the_loss_of_whole_logits(chunk: int, dtype: torch.dtype) -> None:
    hidden, weight, labels, modality, mask = inputs(dtype)
    logits = torch.nn.functional.linear(hidden, weight)
    whole = OBJECTIVE(logits, labels, modality, mask, ALONE)
    wanted = torch.autograd.grad(whole[0], (hidden, weight))
    ce, log_z = chunked_cross_entropy(hidden, weight, labels, ALONE, chunk=chunk)
    found = OBJECTIVE.of_tokens(ce, log_z, modality, mask)
    rounding = 1e-6 if dtype is torch.float32 else 1e-2
    for one, other in zip(found, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    for one, other in zip(torch.autograd.grad(found[0], (hidden, weight)), wanted, strict=True):
        assert one.dtype is dtype
        assert float((one - other).abs().max()) <= rounding * float(other.abs().max())


def test_nothing_of_the_size_of_the_logits_is_kept() -> None:
    hidden, weight, labels, _, _ = inputs()
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chunked_cross_entropy(hidden, weight, labels, ALONE, chunk=2)
    assert sorted(kept) == sorted([hidden.numel(), weight.numel(), *[B * S] * 3])


@distributed(world_size=2)
def test_a_sharded_vocabulary(ranks: RankEnv) -> None:
    """Gradients of the weight are this rank's rows; those of hidden states add up over ranks."""
    groups.start(ranks)
    group = torch.distributed.group.WORLD
    assert group is not None
    hidden, weight, labels, modality, mask = inputs()
    whole = OBJECTIVE(torch.nn.functional.linear(hidden, weight), labels, modality, mask, ALONE)
    grad_hidden, grad_weight = torch.autograd.grad(whole[0], (hidden, weight))
    mine = weight.detach().chunk(2)[ranks.rank].requires_grad_()
    ce, log_z = chunked_cross_entropy(hidden, mine, labels, group, chunk=4)
    found = OBJECTIVE.of_tokens(ce, log_z, modality, mask)
    torch.testing.assert_close(found[0], whole[0], rtol=1e-6, atol=1e-6)
    part, rows = torch.autograd.grad(found[0], (hidden, mine))
    torch.distributed.all_reduce(part)
    torch.testing.assert_close(part, grad_hidden, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows, grad_weight.chunk(2)[ranks.rank], rtol=1e-5, atol=1e-6)
    at_once = cross_entropy(torch.nn.functional.linear(hidden, mine), labels, group)[0]
    # A product of fewer rows is rounded differently on some processors.
    torch.testing.assert_close(at_once, ce, rtol=1e-5, atol=1e-5)
    groups.finalize()
