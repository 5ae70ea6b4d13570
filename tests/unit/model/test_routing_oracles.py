"""Every routing function against a slow oracle, for 1 to 5 modalities of which some are absent."""

from __future__ import annotations

import math
from fractions import Fraction
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checkpoints_tools.huggingface.shipped.configuration_moma import CHOICES
from mmscale.model import routing
from mmscale.model.auxiliary import BINS, calibrated
from mmscale.model.capacity import Slots, TokenCounts, actual_capacity, actual_slots
from mmscale.model.ranking import RANKINGS
from mmscale.model.thresholds import cutoffs, move
from mmscale.tables import settings as tables
from tests.unit.model import routing_oracles as oracles
from tests.unit.model.routing_oracles import Problem, problems

quick = settings(max_examples=50, deadline=None, derandomize=True)


def tensors(problem: Problem) -> tuple[Tensor, Tensor]:
    """Logits [S, B, E] and membership [S, B]."""
    return torch.tensor(problem.logits), torch.tensor(problem.member)


def chosen(problem: Problem) -> routing.Selection:
    logits, member = tensors(problem)
    return routing.expert_choice(
        logits, member, Slots(problem.capacity), per_sequence=problem.per_sequence, rank=RANKINGS[problem.choice]
    )


def pairs(selection: routing.Selection) -> set[tuple[int, int]]:
    """(expert, token) of every slot that counts; no pair twice."""
    found = [
        (expert, token)
        for expert, (tokens, valid) in enumerate(zip(selection.token.tolist(), selection.valid.tolist(), strict=True))
        for token, counts in zip(tokens, valid, strict=True)
        if counts
    ]
    assert len(found) == len(set(found))
    return set(found)


@quick
@given(problems())
def test_ranks(problem: Problem) -> None:
    ranked = RANKINGS[problem.choice](torch.tensor(problem.logits)).reshape(-1, problem.experts)
    for token, got in enumerate(ranked.tolist()):
        assert got == pytest.approx(problem.ranked(token), rel=1e-6, abs=1e-7)


def test_every_choice_of_the_schema_has_a_ranking() -> None:
    assert tuple(RANKINGS) == tuple(tables.RANKINGS)
    assert tuple(RANKINGS) == CHOICES  # of the exported model


@pytest.mark.parametrize("choice", RANKINGS)
def test_an_expert_that_is_alone_ranks_by_its_logit(choice: str) -> None:
    logits = torch.tensor([0.5, -1.0, 2.0]).view(3, 1, 1)
    member = torch.ones(3, 1, dtype=torch.bool)
    assert pairs(routing.expert_choice(logits, member, Slots(2), per_sequence=True, rank=RANKINGS[choice])) == {
        (0, 0),
        (0, 2),
    }


@pytest.mark.parametrize("choice", RANKINGS)
def test_logits_that_differ_by_rounding_are_ties(choice: str) -> None:
    """The difference to the others is small where all logits are alike, and rounding would decide."""
    first = torch.tensor([0.31037587, 0.31036, 0.3104])
    logits = torch.stack((first, first, torch.nextafter(first, first + 1))).view(3, 1, 3)
    member = torch.ones(3, 1, dtype=torch.bool)
    found = pairs(routing.expert_choice(logits, member, Slots(1), per_sequence=True, rank=RANKINGS[choice]))
    assert found == {(0, 0), (1, 0), (2, 0)}


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@quick
@given(problems())
def test_expert_choice(problem: Problem) -> None:
    assert pairs(chosen(problem)) == oracles.expert_choice(problem)


@quick
@given(problems())
def test_gates_are_sigmoids_of_the_logits(problem: Problem) -> None:
    selection = chosen(problem)
    for expert in range(problem.experts):
        for token, gate, valid in zip(
            selection.token[expert].tolist(), selection.gate[expert].tolist(), selection.valid[expert], strict=True
        ):
            logit = problem.logits[token // problem.batch][token % problem.batch][expert]
            assert gate == pytest.approx(sigmoid(logit) if valid else 0.0, abs=1e-6)


@quick
@given(problems())
def test_chosen_by_and_count_choices(problem: Problem) -> None:
    selection, tokens = chosen(problem), problem.length * problem.batch
    taken = routing.chosen_by(selection, tokens)
    want = oracles.expert_choice(problem)
    assert {(e, t) for t, e in taken.nonzero().tolist()} == want
    for modality in range(problem.modalities):
        own = [t for t in range(tokens) if problem.of_token(problem.modality, t) == modality]
        mine = {(e, t) for e, t in want if t in own}
        sums = routing.count_choices(taken, selection, torch.tensor([t in own for t in range(tokens)])).tolist()
        assert sums[:2] == [len(own), len(own) - len({t for _, t in mine})]
        for expert in range(problem.experts):
            logits = [problem.logits[t // problem.batch][t % problem.batch][expert] for e, t in mine if e == expert]
            assert sums[2 + expert] == pytest.approx(sum(map(sigmoid, logits)), abs=1e-5)
            for other in range(problem.experts):
                both = sum((other, t) in mine for e, t in mine if e == expert)
                assert sums[2 + problem.experts + expert * problem.experts + other] == both


@quick
@given(problems())
def test_combine(problem: Problem) -> None:
    selection, tokens = chosen(problem), problem.length * problem.batch
    value = torch.arange(problem.experts * tokens, dtype=torch.float32).view(problem.experts, tokens, 1)
    outputs = torch.stack([value[e, selection.token[e]] for e in range(problem.experts)])
    want = [0.0] * tokens
    for expert, token in oracles.expert_choice(problem):
        logit = problem.logits[token // problem.batch][token % problem.batch][expert]
        want[token] += sigmoid(logit) * (expert * tokens + token)
    assert routing.combine(outputs, selection, tokens).view(-1).tolist() == pytest.approx(want, rel=1e-5, abs=1e-5)


@quick
@given(problems(), st.integers(0, 2**32), st.integers(0, 3))
def test_decided(problem: Problem, seed: int, spare: int) -> None:
    """Exactly the tokens that were decided, whatever the number of slots."""
    logits, member = tensors(problem)
    random = Random(seed)
    taken = torch.tensor(
        [[[m and random.random() < 0.4 for _ in range(problem.experts)] for m in row] for row in problem.member]
    )
    most = max(1, int(taken.sum(dim=(0, 1)).max()))
    capacity = min(most + spare, member.numel())
    selection = routing.decided(taken, torch.sigmoid(logits), capacity)
    assert selection.token.shape == (problem.experts, capacity)
    flat = taken.reshape(-1, problem.experts)
    assert pairs(selection) == {(e, t) for t, e in flat.nonzero().tolist()}


FACTORS = (Fraction(1), Fraction(3, 10), Fraction(5, 2))


def counted(modality: list[list[int]], modalities: int) -> list[list[int]]:
    """Tokens of each modality in each sequence, [B][M]."""
    return [[column.count(number) for number in range(modalities)] for column in map(list, zip(*modality, strict=True))]


@quick
@given(problems(), st.integers(0, 2**32), st.integers(1, 3), st.sampled_from(FACTORS), st.sampled_from((1, 2, 3)))
def test_actual_capacity(problem: Problem, seed: int, ranks: int, factor: Fraction, multiple: int) -> None:
    """Choices, cut-offs and slots follow the tokens that are there; slots are those that the fullest rank needs."""
    random, tokens = Random(seed), problem.length * problem.batch
    tables = [counted(problem.modality, problem.modalities)]
    for _ in range(ranks - 1):
        other = [[random.randint(-1, problem.modalities - 1) for _ in row] for row in problem.modality]
        tables.insert(random.randint(0, len(tables)), counted(other, problem.modalities))
    counts = TokenCounts(np.array(counted(problem.modality, problem.modalities)), np.array(tables))
    logits, member = tensors(problem)

    def capacity(found: int) -> int:
        return oracles.actual_capacity(found, problem.experts, factor, multiple)

    slots = actual_slots(
        counts,
        member,
        problem.group,
        problem.experts,
        per_sequence=problem.per_sequence,
        factor=float(factor),
        multiple=multiple,
    )
    needed = 0
    for table in tables:
        scopes = [sum(row[number] for number in problem.group) for row in table]
        needed = max(needed, sum(map(capacity, scopes)) if problem.per_sequence else capacity(sum(scopes)))
    rank = RANKINGS[problem.choice]
    selection = routing.expert_choice(logits, member, slots, per_sequence=problem.per_sequence, rank=rank)
    assert selection.token.shape[1] == min(tokens, math.ceil(max(1, needed) / multiple) * multiple)
    assert all(len(set(row)) == len(row) for row in selection.token.tolist())
    assert pairs(selection) == oracles.expert_choice(problem, capacity)
    assert torch.all(selection.gate[~selection.valid] == 0.0)
    sums, number = oracles.cutoffs(problem, capacity)
    found = cutoffs(rank(logits), member, slots, per_sequence=problem.per_sequence)
    assert found.tolist() == pytest.approx([*sums, number], rel=1e-6, abs=1e-6)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.booleans(), st.sampled_from(FACTORS))
def test_actual_capacity_of_what_depth_keeps(seed: int, per_sequence: bool, factor: Fraction) -> None:
    """The host knows at most how many tokens are kept of a group; the device counts them."""
    depth_logits, modalities, keep, quotas = depth_problem(seed)
    random, number = Random(seed), 5
    index = routing.depth_choice(depth_logits, torch.tensor(modalities), keep, quotas)
    kept = torch.tensor(modalities).gather(0, index)
    quotas = None if quotas is None else (*quotas, *[0] * (number - len(quotas)))
    own = np.array(counted(modalities, number))
    group = tuple(sorted(random.sample(range(number), random.randint(1, number))))
    logits = [[[random.randint(-24, 24) / 8 for _ in range(3)] for _ in row] for row in kept.tolist()]
    problem = Problem(number, kept.tolist(), logits, group, per_sequence, 1)
    counts = TokenCounts(own, own[None]).kept(keep, quotas)
    _, member = tensors(problem)
    assert (member.sum(dim=0).numpy() <= counts.most(own, group)).all()
    slots = actual_slots(
        counts, member, group, problem.experts, per_sequence=per_sequence, factor=float(factor), multiple=1
    )
    selection = routing.expert_choice(torch.tensor(logits), member, slots, per_sequence=per_sequence)
    want = oracles.expert_choice(problem, lambda found: oracles.actual_capacity(found, problem.experts, factor, 1))
    assert pairs(selection) == want


@quick
@given(st.integers(0, 5000), st.integers(1, 9), st.sampled_from((0.1, 0.3, 1.0, 1.1, 2.5)), st.sampled_from((1, 7, 16)))
def test_actual_capacity_in_numbers(tokens: int, experts: int, factor: float, multiple: int) -> None:
    """The host and the device compute the same."""
    want = oracles.actual_capacity(tokens, experts, Fraction(str(factor)), multiple)
    for there in (np.array([tokens], np.float64), torch.tensor([tokens], dtype=torch.float64)):
        assert actual_capacity(there, experts, factor=factor, multiple=multiple).tolist() == [want]


def depth_problem(seed: int) -> tuple[Tensor, list[list[int]], int, tuple[int, ...] | None]:
    """Logits [S, B], modalities [S][B], tokens to keep, and quotas that use all of these up, some, or none.

    Evenly random: the faults to find need several modalities with quotas, and drawn examples are mostly small ones.
    """
    random = Random(seed)
    modalities, length, batch = random.randint(1, 5), random.randint(1, 12), random.randint(1, 2)
    lowest = random.choice((-1, 0))  # with padding, or without
    modality = [[random.randint(lowest, modalities - 1) for _ in range(batch)] for _ in range(length)]
    logits = torch.tensor([[random.randint(-24, 24) / 8 for _ in range(batch)] for _ in range(length)])
    keep, quotas = random.randint(1, length), None
    if random.random() < 0.8:
        owners = [random.randint(lowest, modalities - 1) for _ in range(keep)]
        quotas = tuple(owners.count(number) for number in range(modalities))
    return logits, modality, keep, quotas


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_depth_choice(seed: int) -> None:
    logits, modalities, keep, quotas = depth_problem(seed)
    index = routing.depth_choice(logits, torch.tensor(modalities), keep, quotas)
    for b in range(logits.shape[1]):
        modality = [row[b] for row in modalities]
        got = index[:, b].tolist()
        assert got == sorted(set(got)) and len(got) == keep
        real = [i for i in got if modality[i] >= 0]
        assert real == oracles.depth_choice(logits[:, b].tolist(), modality, keep, quotas)


def test_a_short_modality_takes_nothing_from_the_quotas_of_others() -> None:
    """Positions that fill up the quota of an absent modality are tokens of others; they were reserved, and stay so."""
    logits = torch.tensor([-2.0, -1.0, 3.0, 2.0, 1.0, 0.5]).view(6, 1)
    modality = torch.tensor([0, 0, 1, 1, 1, 1]).view(6, 1)
    assert routing.depth_choice(logits, modality, 4, (2, 1, 1)).view(-1).tolist() == [0, 1, 2, 3]


@quick
@given(problems())
def test_depth_decided(problem: Problem) -> None:
    taken = torch.tensor(problem.member)
    keep = max(1, int(taken.sum(dim=0).max()))
    index, valid = routing.depth_decided(taken, keep)
    for b in range(problem.batch):
        want = [s for s in range(problem.length) if problem.member[s][b]]
        assert valid[:, b].tolist() == [place < len(want) for place in range(keep)]
        assert index[: len(want), b].tolist() == want
        assert len(set(index[:, b].tolist())) == keep


@quick
@given(problems())
def test_cutoffs(problem: Problem) -> None:
    logits, member = tensors(problem)
    sums, number = oracles.cutoffs(problem)
    ranked = RANKINGS[problem.choice](logits)
    found = cutoffs(ranked, member, Slots(problem.capacity), per_sequence=problem.per_sequence)
    assert found.tolist() == pytest.approx([*sums, number], rel=1e-6, abs=1e-6)


@quick
@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(0, 9), st.integers(1, 99))
def test_calibrated(counts: list[int], taken: int, place: int) -> None:
    histogram = [0] * BINS
    for number, count in enumerate(counts):
        histogram[number * place * 7] = count
    found = calibrated(torch.tensor([histogram]), torch.tensor([taken]))
    assert found.tolist() == [oracles.calibrated(histogram, taken)]


@quick
@given(
    st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=4), st.integers(0, 3), st.sampled_from((0.0, 0.5, 1.0))
)
def test_move(sums: list[float], number: int, decay: float) -> None:
    threshold = torch.linspace(-1, 1, len(sums))
    want = [
        old if number == 0 else decay * old + (1 - decay) * value / number
        for old, value in zip(threshold.tolist(), sums, strict=True)
    ]
    move(threshold, torch.tensor([*sums, number], dtype=torch.float64), decay=decay)
    assert threshold.tolist() == pytest.approx(want, abs=1e-6)
