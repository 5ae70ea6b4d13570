"""Expert choice, depth choice, combination and router noise: gradients, ties, extreme values; noise.

Choices themselves are compared with slow oracles in test_routing_oracles.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from mmscale.model.capacity import Slots
from mmscale.model.routing import (
    Selection,
    _best_on_host,
    _coarse,
    combine,
    depth_choice,
    expert_choice,
    gumbel_noise,
    noise_key,
)
from tests.unit.model.reference_parts import Choice, choose

WIDTH = 3
quick = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, bool]:
    """Logits [S, B, E], membership [S, B], a capacity up to all tokens of the scope, and the scope."""
    length, batch, experts = draw(st.integers(1, 9)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    per_sequence = draw(st.booleans())
    capacity = draw(st.integers(1, length if per_sequence else length * batch))
    logits = torch.randn(length, batch, experts, generator=torch.Generator().manual_seed(draw(st.integers(0, 10_000))))
    member = torch.tensor(draw(st.lists(st.booleans(), min_size=length * batch, max_size=length * batch)))
    member = member & draw(st.sampled_from((True, True, False)))  # sometimes a group without any token
    return logits, member.view(length, batch), capacity, per_sequence


def by_loops(logits: Tensor, member: Tensor, capacity: int, per_sequence: bool) -> Choice:
    """The same choice, (expert, flat token) -> gate."""
    length, batch, _ = logits.shape
    flat = logits.reshape(length * batch, -1).sigmoid().tolist()
    own = member.reshape(-1).tolist()
    tokens = list(range(length * batch))
    scopes = [[t for t in tokens if t % batch == b] for b in range(batch)] if per_sequence else [tokens]
    chosen = {}
    for scope in scopes:
        picked = choose([flat[t] for t in scope], [own[t] for t in scope], capacity)
        chosen.update({(expert, scope[t]): gate for (expert, t), gate in picked.items()})
    return chosen


def as_choice(selection: Selection) -> Choice:
    """The valid slots of a selection."""
    return {
        (expert, int(token)): float(gate)
        for expert in range(selection.token.shape[0])
        for token, gate, valid in zip(
            selection.token[expert], selection.gate[expert], selection.valid[expert], strict=True
        )
        if valid
    }


@quick
@given(problems())
def test_expert_choice_is_the_loops(problem: tuple[Tensor, Tensor, int, bool]) -> None:
    logits, member, capacity, per_sequence = problem
    selection = expert_choice(logits, member, Slots(capacity), per_sequence=per_sequence)
    want = by_loops(logits, member, capacity, per_sequence)
    got = as_choice(selection)
    assert got.keys() == want.keys()
    assert all(got[key] == pytest.approx(gate, abs=1e-6) for key, gate in want.items())

    length, batch, experts = logits.shape
    assert selection.token.shape == (experts, capacity * (batch if per_sequence else 1))
    for row in selection.token.tolist():  # combine and the exchange rely on it, in empty slots too
        assert len(set(row)) == len(row) and min(row) >= 0 and max(row) < length * batch
    assert torch.all(selection.gate[~selection.valid] == 0.0)


@quick
@given(problems())
def test_combine_and_its_gradients_are_the_loops(problem: tuple[Tensor, Tensor, int, bool]) -> None:
    logits, member, capacity, per_sequence = problem
    length, batch, experts = logits.shape
    generator = torch.Generator().manual_seed(1)
    logits = logits.clone().requires_grad_()
    every = torch.randn(
        experts, length * batch, WIDTH, generator=generator, requires_grad=True
    )  # output of e for token t
    direction = torch.randn(length * batch, WIDTH, generator=generator)

    selection = expert_choice(logits, member, Slots(capacity), per_sequence=per_sequence)
    outputs = torch.stack([every[e, selection.token[e]] for e in range(experts)])
    total = combine(outputs, selection, length * batch)
    got = torch.autograd.grad((total * direction).sum(), (logits, every))

    rows = [torch.zeros(WIDTH) for _ in range(length * batch)]
    gates = logits.reshape(length * batch, experts).sigmoid()
    for expert, token in by_loops(logits.detach(), member, capacity, per_sequence):
        rows[token] = rows[token] + gates[token, expert] * every[expert, token]
    want_total = torch.stack(rows)
    torch.testing.assert_close(total, want_total)
    loss = (want_total * direction).sum() + 0.0 * (logits.sum() + every.sum())  # a graph even if nothing was chosen
    for mine, reference in zip(got, torch.autograd.grad(loss, (logits, every)), strict=True):
        torch.testing.assert_close(mine, reference)


def test_empty_slots_have_no_gradient() -> None:
    logits = torch.randn(4, 1, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    member = torch.tensor([[True], [False], [False], [False]])
    selection = expert_choice(logits, member, Slots(3), per_sequence=True)
    assert selection.valid.sum(dim=1).tolist() == [1, 1]
    (gradient,) = torch.autograd.grad(selection.gate.sum(), logits)
    assert torch.all(gradient[1:] == 0.0)
    assert torch.all(gradient[0] > 0.0)  # the slot that is filled has one, so the zeros mean something


def test_without_any_token_everything_is_zero_but_connected() -> None:
    logits = torch.randn(3, 2, 2, requires_grad=True)
    outputs = torch.randn(2, 4, WIDTH, requires_grad=True)
    selection = expert_choice(logits, torch.zeros(3, 2, dtype=torch.bool), Slots(2), per_sequence=True)
    total = combine(outputs, selection, 6)
    assert torch.all(total == 0.0)
    for gradient in torch.autograd.grad(total.sum(), (logits, outputs)):  # DDP waits for every gradient
        assert torch.all(gradient == 0.0)


def test_gates_are_not_renormalised() -> None:
    logits = torch.full((1, 1, 4), 2.0)
    selection = expert_choice(logits, torch.ones(1, 1, dtype=torch.bool), Slots(1), per_sequence=True)
    assert float(selection.gate.sum()) == pytest.approx(4 * 0.880797)  # a softmax or a renormalisation would give 1


@pytest.mark.parametrize("value", [0.0, 60.0, -200.0])
@pytest.mark.parametrize("per_sequence", [True, False])
def test_ties_go_to_the_earlier_token(value: float, per_sequence: bool) -> None:
    """Repeated tokens tie exactly in layer 0; another layout must not choose others. The values saturate a sigmoid."""
    logits = torch.full((50, 2, 3), value)
    member = torch.zeros(50, 2, dtype=torch.bool)
    member[1::2, 0] = True
    selection = expert_choice(logits, member, Slots(4), per_sequence=per_sequence)
    for row, valid in zip(selection.token, selection.valid, strict=True):
        assert len(set(row.tolist())) == row.numel()
        assert sorted(row[valid].tolist()) == [2, 6, 10, 14]  # even with score 0 members come before others


ORDINARY = st.floats(allow_nan=False, width=32)
# Rounding differences, both zeros, and the value of tokens of other groups.
TIED = st.sampled_from([0.0, -0.0, 1.0, 1.0000001, -1.0, -1.0000001, 3e-39, float("-inf"), float("inf")])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_host_chooses_as_a_stable_sort_does(data: st.DataObject) -> None:
    columns = data.draw(st.sampled_from([(1,), (3,), (2, 3)]))
    length = data.draw(st.integers(1, 12))
    count = data.draw(st.integers(0, length + 1))
    size = length * math.prod(columns)
    values = torch.tensor(data.draw(st.lists(ORDINARY | TIED, min_size=size, max_size=size)), dtype=torch.float32)
    ranked = values.view(length, *columns)
    expected = _coarse(ranked).sort(dim=0, descending=True, stable=True).indices[:count]
    assert torch.equal(_best_on_host(ranked, count), expected)


def test_saturated_scores_are_still_ranked() -> None:
    """sigmoid(20) = sigmoid(30) = 1 in fp32, but the larger logit is the better one."""
    logits = torch.tensor([20.0, 30.0, 25.0, 18.0]).view(4, 1, 1)
    selection = expert_choice(logits, torch.tensor([True, True, True, False]).view(4, 1), Slots(2), per_sequence=True)
    assert sorted(selection.token[0].tolist()) == [1, 2]
    assert torch.all(selection.gate == 1.0)


@quick
@given(problems())
def test_a_sequence_chooses_by_itself(problem: tuple[Tensor, Tensor, int, bool]) -> None:
    logits, member, capacity, _ = problem
    capacity, batch = min(capacity, logits.shape[0]), logits.shape[1]
    whole = as_choice(expert_choice(logits, member, Slots(capacity), per_sequence=True))
    for b in range(batch):
        alone = as_choice(expert_choice(logits[:, b : b + 1], member[:, b : b + 1], Slots(capacity), per_sequence=True))
        # Which tokens is exact; a sigmoid's last bit may depend on where in a vector register its element stood.
        assert {(e, t // batch): gate for (e, t), gate in whole.items() if t % batch == b} == pytest.approx(
            alone, abs=2e-7
        )


def test_a_micro_batch_chooses_together() -> None:
    """Control of the test above: this scope does depend on the other sequences."""
    logits = torch.tensor([[1.0, 3.0], [2.0, 4.0]]).unsqueeze(-1)
    member = torch.ones(2, 2, dtype=torch.bool)
    assert {t for _, t in as_choice(expert_choice(logits, member, Slots(2), per_sequence=False))} == {1, 3}
    assert {t for _, t in as_choice(expert_choice(logits, member, Slots(1), per_sequence=True))} == {2, 3}


def test_combine_accumulates_in_fp32() -> None:
    outputs = torch.tensor([[[256.0]], [[1.0]], [[1.0]]], dtype=torch.bfloat16)  # 256 + 1 = 256 in bf16
    ones = torch.ones(3, 1)
    total = combine(outputs, Selection(torch.zeros(3, 1, dtype=torch.int64), ones, ones.bool()), 1)
    assert total.dtype is torch.float32 and float(total) == 258.0


# --- depth ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-200.0, 0.0, 60.0])
def test_depth_ties_go_to_the_earlier_token(value: float) -> None:
    logits = torch.full((60, 1), value)
    modality = torch.tensor([-1, 0, 1, 1, -1, 0] * 10).view(60, 1)
    assert depth_choice(logits, modality, 5, None).view(-1).tolist() == [1, 2, 3, 5, 7]
    assert depth_choice(logits, modality, 4, (3, 0)).view(-1).tolist() == [1, 2, 5, 7]
    assert len(set(depth_choice(logits, modality, 60, (1, 1)).view(-1).tolist())) == 60


def test_quotas_come_before_better_scores() -> None:
    logits = torch.tensor([9.0, 8.0, 7.0, -100.0]).view(4, 1)
    modality = torch.tensor([0, 0, 0, 1]).view(4, 1)
    assert depth_choice(logits, modality, 2, None).view(-1).tolist() == [0, 1]
    assert depth_choice(logits, modality, 2, (1, 1)).view(-1).tolist() == [0, 3]
    # A modality with fewer tokens than its quota leaves the rest to the others.
    assert depth_choice(logits, modality, 3, (1, 2)).view(-1).tolist() == [0, 1, 3]


# --- noise ----------------------------------------------------------------------------------------------------------


def test_noise_is_a_function_of_its_key() -> None:
    shape, cpu = torch.Size((6, 2, 3)), torch.device("cpu")
    torch.manual_seed(0)
    first = gumbel_noise(shape, key=5, device=cpu)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(first, gumbel_noise(shape, key=5, device=cpu))
    assert not torch.equal(first, gumbel_noise(shape, key=6, device=cpu))
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())  # dropout's random state is left alone


def test_noise_is_logistic() -> None:
    noise = gumbel_noise(torch.Size((20_000,)), key=123, device=torch.device("cpu")).numpy()
    assert stats.kstest(noise, "logistic").pvalue > 0.01
    assert stats.kstest(noise, "norm", args=(0.0, noise.std())).pvalue < 0.01  # the test can tell
    assert noise.std() == pytest.approx(1.8138, rel=0.02)  # pi / sqrt(3)


def test_keys_of_seeds_micro_batches_and_layers_are_different() -> None:
    keys = {
        noise_key(seed=seed, micro_batch=number, layer=layer)
        for seed in (0, 1, 1234, -1)
        for number in (0, 1, 11, 2**40)
        for layer in (1, 2, 11)
    }
    assert len(keys) == 48 and all(0 <= key < 2**63 for key in keys)


def test_noise_of_neighbouring_keys_is_independent() -> None:
    """A generator seeded with neighbouring keys must not give shifted or scaled copies."""
    noise = torch.stack(
        [gumbel_noise(torch.Size((2000,)), key=key, device=torch.device("cpu")) for key in range(1000, 1008)]
    )
    correlation = torch.corrcoef(noise) - torch.eye(8)
    assert correlation.abs().max() < 0.1  # 4.5 standard deviations
    assert torch.isfinite(noise).all()
