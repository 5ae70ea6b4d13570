"""Cross entropy, z-loss and their sums per modality: values and gradients against torch in fp64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmscale.data.stream.answer_requests import WantedTokens
from mmscale.runtime import groups
from mmscale.runtime.rank_env import RankEnv
from mmscale.train.steps.loss import Objective, cross_entropy, picked
from mmscale.train.steps.step import mean_losses
from tests.support import distributed

B, S, V = 3, 7, 24


@dataclass(frozen=True)
class _Group:
    """A rank of a tensor-parallel group of one: no process group is needed then."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


ALONE: torch.distributed.ProcessGroup = _Group()  # type: ignore[assignment]


def batch(*, scale: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, labels, their modality (of 3; the last has none in this batch) and a mask."""
    rng = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(B, S, V, generator=rng)
    labels = torch.randint(0, V, (B, S), generator=rng)
    modality = (labels >= V // 2).to(torch.int8)
    mask = (torch.rand(B, S, generator=rng) > 0.3).float()
    return logits, labels, modality, mask


def reference(
    logits: Tensor, labels: Tensor, modality: Tensor, mask: Tensor, *, weights: tuple[float, ...], z_loss: float
) -> Tensor:
    """The objective's definition, in fp64, one token after another."""
    logits = logits.double()
    total = logits.new_zeros(())
    for b in range(B):
        for s in range(S):
            if mask[b, s]:
                ce = F.cross_entropy(logits[b, s][None], labels[b, s][None])
                log_z = torch.logsumexp(logits[b, s], dim=0)
                total = total + weights[int(modality[b, s])] * ce + z_loss * log_z**2
    return total


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4], ids=["usual", "large", "huge"])
def test_cross_entropy_and_log_z_equal_torch(scale: float) -> None:
    logits, labels, _, _ = batch(scale=scale)
    ce, log_z = cross_entropy(logits, labels, ALONE)
    expected = F.cross_entropy(logits.double().reshape(-1, V), labels.reshape(-1), reduction="none").view(B, S)
    # Relative to the logits: log Z - logit[label] cancels where the label is the largest.
    torch.testing.assert_close(ce.double(), expected, rtol=1e-6, atol=3e-7 * scale)
    torch.testing.assert_close(log_z.double(), torch.logsumexp(logits.double(), dim=-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("z_loss", [0.0, 1e-5, 0.3])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, 1.0), (0.0, 1.0, 1.0)])
def test_objective_and_its_gradient_equal_the_definition(weights: tuple[float, ...], z_loss: float) -> None:
    logits, labels, modality, mask = batch()
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, number, _ = Objective(3, weights, z_loss)(mine, labels, modality, mask, ALONE)
    expected = reference(theirs, labels, modality, mask, weights=weights, z_loss=z_loss)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    assert number.dtype is torch.int32 and int(number) == int(mask.sum())
    loss.backward()
    expected.backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_gradient_by_finite_differences() -> None:
    """Of both outputs at once, in a direction: the backward pass is written by hand."""
    logits, labels, _, _ = batch()
    rng = torch.Generator().manual_seed(1)
    direction = torch.randn(logits.shape, generator=rng)
    a, b = torch.randn(B, S, generator=rng), torch.randn(B, S, generator=rng)

    def value(at: Tensor) -> Tensor:
        ce, log_z = cross_entropy(at, labels, ALONE)
        return (a * ce + b * log_z.square()).double().sum()

    at = logits.clone().requires_grad_()
    value(at).backward()
    assert at.grad is not None
    step = 1e-2
    slope = (value(logits + step * direction) - value(logits - step * direction)) / (2 * step)
    assert float((at.grad * direction).sum()) == pytest.approx(float(slope), rel=1e-3)


def test_masked_tokens_have_no_gradient_and_no_part_in_any_sum() -> None:
    logits, labels, modality, mask = batch()
    spoilt = torch.where(mask[..., None] > 0, logits, 1e3 * torch.randn(B, S, V))
    first, second = logits.clone().requires_grad_(), spoilt.clone().requires_grad_()
    objective = Objective(2, (1.0, 1.0), 0.1)
    loss, number, sums = objective(first, labels, modality, mask, ALONE)
    other, other_number, other_sums = objective(second, labels, modality, mask, ALONE)
    assert torch.equal(loss, other) and torch.equal(number, other_number) and torch.equal(sums, other_sums)
    other.backward()
    assert second.grad is not None
    assert (second.grad[mask == 0] == 0).all() and (second.grad[mask > 0] != 0).any()


def test_a_batch_in_which_nothing_is_trained_on_is_zero_and_not_nan() -> None:
    logits, labels, modality, mask = batch()
    logits.requires_grad_()
    loss, number, sums = Objective(2, (1.0, 1.0), 0.1)(logits, labels, modality, torch.zeros_like(mask), ALONE)
    loss.backward()
    assert float(loss) == 0.0 and int(number) == 0 and (sums == 0).all()
    assert logits.grad is not None and (logits.grad == 0).all()
    assert mean_losses(sums, ("text", "image")) == {}


def test_sums_by_modality_become_means_without_weights() -> None:
    """What is logged is the plain cross entropy: weights change what is learned, not what is measured."""
    logits, labels, modality, mask = batch()
    _, _, sums = Objective(3, (0.5, 2.0, 1.0), 0.3)(logits, labels, modality, mask, ALONE)
    ce = F.cross_entropy(logits.reshape(-1, V), labels.reshape(-1), reduction="none").view(B, S)
    log_z = torch.logsumexp(logits, dim=-1)
    means = mean_losses(sums, ("text", "image", "speech"))
    assert means.keys() == {"loss", "z_loss", "loss/text", "loss/image"}  # no speech label: left out, not 0
    assert means["loss"] == pytest.approx(float(ce[mask > 0].mean()), rel=1e-5)
    assert means["z_loss"] == pytest.approx(float(log_z[mask > 0].square().mean()), rel=1e-5)
    for index, name in enumerate(("text", "image")):
        chosen = (mask > 0) & (modality == index)
        assert means[f"loss/{name}"] == pytest.approx(float(ce[chosen].mean()), rel=1e-5)
        assert float(sums[index, 1]) == float(chosen.sum())


def test_sums_of_parts_add_up() -> None:
    """Micro-batches and data-parallel ranks are added: the sums of a batch are those of its rows."""
    logits, labels, modality, mask = batch()
    objective = Objective(2, (1.0, 1.0), 0.1)
    _, _, whole = objective(logits, labels, modality, mask, ALONE)
    cut = [[x[b : b + 1] for x in (logits, labels, modality, mask)] for b in range(B)]
    rows = [objective(a, b, c, d, ALONE)[2] for a, b, c, d in cut]
    torch.testing.assert_close(torch.stack(rows).sum(dim=0), whole)


def test_bf16_logits_are_summed_in_fp32() -> None:
    logits, labels, modality, mask = batch()
    rounded = logits.bfloat16()
    loss, _, _ = Objective(2, (1.0, 1.0), 0.1)(rounded, labels, modality, mask, ALONE)
    expected = reference(rounded, labels, modality, mask, weights=(1.0, 1.0), z_loss=0.1)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)


@distributed(world_size=2)
def test_sharded_vocabulary_equals_one_process(ranks: RankEnv) -> None:
    """Labels of either half, of both modalities, and logits so large that only the global maximum saves them."""
    from mmscale.runtime import groups

    collection = groups.initialize(ranks, tp=2)
    for scale in (1.0, 1e3):
        logits, labels, modality, mask = batch(scale=scale)
        assert {int(label) // (V // 2) for label in labels.flatten()} == {0, 1}
        rows = slice(ranks.rank * V // 2, (ranks.rank + 1) * V // 2)
        objective = Objective(3, (0.5, 2.0, 1.0), 0.1)
        whole, part = logits.clone().requires_grad_(), logits[..., rows].clone().requires_grad_()
        expected, expected_number, expected_sums = objective(whole, labels, modality, mask, ALONE)
        loss, number, sums = objective(part, labels, modality, mask, collection.tp)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(sums, expected_sums, rtol=1e-6, atol=1e-6)
        assert torch.equal(number, expected_number)
        expected.backward()
        loss.backward()
        assert whole.grad is not None
        torch.testing.assert_close(part.grad, whole.grad[..., rows], rtol=1e-6, atol=1e-6 * scale)
    groups.finalize()


def wanted(*, seed: int = 0) -> WantedTokens:
    """Places of which some are asked for several tokens."""
    rng = np.random.default_rng(seed)
    at = rng.choice(B * S, size=9, replace=False)
    places = rng.integers(0, 9, size=14)
    tokens = rng.integers(0, V, size=14)
    return WantedTokens(at // S, at % S, places, tokens, asked=np.arange(14))


def asked_for(logits: Tensor, tokens: WantedTokens) -> Tensor:
    """The definition, in fp64, one token after another."""
    found = []
    for place, token in zip(tokens.places, tokens.tokens, strict=True):
        at = logits[tokens.rows[place], tokens.positions[place]].double()
        found.append([float(F.log_softmax(at, dim=0)[token]), float(at.argmax() == token)])
    return torch.tensor(found)


@pytest.mark.parametrize("chunk", [0, 1, 4, 9, 100])
def test_log_probabilities_of_single_tokens(chunk: int) -> None:
    """From logits, and from hidden states of which no more than a chunk become logits at a time."""
    logits, *_ = batch()
    tokens = wanted()
    expected = asked_for(logits, tokens)
    torch.testing.assert_close(picked(logits.clone(), tokens, ALONE, chunk=chunk), expected, rtol=1e-6, atol=1e-6)
    weight, seen = torch.randn(V, V, generator=torch.Generator().manual_seed(5)), []

    def of(rows: Tensor) -> Tensor:
        seen.append(len(rows))
        return F.linear(rows, weight)

    found = picked(logits.clone(), tokens, ALONE, logits=of, chunk=chunk)
    torch.testing.assert_close(found, asked_for(F.linear(logits, weight), tokens), rtol=1e-5, atol=1e-5)
    assert sum(seen) == 9 and max(seen) <= (chunk or 9)
    nothing = WantedTokens(*(np.zeros(0, dtype=np.int64) for _ in range(5)))
    assert picked(logits, nothing, ALONE, chunk=chunk).shape == (0, 2)


@distributed(world_size=2)
def test_log_probabilities_under_a_sharded_vocabulary(ranks: RankEnv) -> None:
    groups.start(ranks)
    group = torch.distributed.group.WORLD
    assert group is not None
    logits, *_ = batch()
    mine = logits.chunk(2, dim=-1)[ranks.rank]
    for chunk in (0, 4):
        found = picked(mine.clone(), wanted(), group, chunk=chunk)
        torch.testing.assert_close(found, asked_for(logits, wanted()), rtol=1e-6, atol=1e-6)
    groups.finalize()
