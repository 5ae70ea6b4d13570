"""Slow oracles of the routing functions, in plain Python over lists: one token, expert and modality at a time.

They share nothing with mmscale.model. Tokens are numbered as the functions number them, s * B + b.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from hypothesis import strategies as st

PADDING = -1


@dataclass(frozen=True)
class Problem:
    """A micro-batch of few tokens.

    Attributes:
        modalities: number of modalities; some may have no token.
        modality: of each token, [S][B], -1 for padding.
        logits: [S][B][E], multiples of 1/8: exact in any format, and often equal.
        group: the modalities of the group of experts.
        per_sequence: experts choose in each sequence by itself.
        capacity: tokens that an expert takes of each scope.
        choice: what an expert ranks tokens by.
    """

    modalities: int
    modality: list[list[int]]
    logits: list[list[list[float]]]
    group: tuple[int, ...]
    per_sequence: bool
    capacity: int
    choice: str = "sigmoid"

    @property
    def length(self) -> int:
        """S."""
        return len(self.modality)

    @property
    def batch(self) -> int:
        """B."""
        return len(self.modality[0])

    @property
    def experts(self) -> int:
        """E."""
        return len(self.logits[0][0])

    @property
    def member(self) -> list[list[bool]]:
        """Whether each token belongs to the group, [S][B]."""
        return [[own in self.group for own in row] for row in self.modality]

    def ranked(self, token: int) -> list[float]:
        """What each expert ranks a token by."""
        return rank(self.logits[token // self.batch][token % self.batch], self.choice)

    def scopes(self) -> list[list[int]]:
        """Token numbers among which an expert chooses, in the order of the tokens."""
        tokens = range(self.length * self.batch)
        if not self.per_sequence:
            return [list(tokens)]
        return [[token for token in tokens if token % self.batch == b] for b in range(self.batch)]

    def of_token(self, table: Sequence[Sequence[object]], token: int) -> object:
        """The entry of a token in a table [S][B]."""
        return table[token // self.batch][token % self.batch]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """1 to 5 modalities, any of which may be absent; groups of one modality or more."""
    modalities, experts = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    length, batch = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    everyone = list(range(modalities))
    present = [PADDING, *draw(st.lists(st.sampled_from(everyone), unique=True))]
    tokens = st.lists(st.sampled_from(present), min_size=batch, max_size=batch)
    eighths = st.integers(-24, 24).map(lambda value: value / 8)
    scores = st.lists(
        st.lists(eighths, min_size=experts, max_size=experts),
        min_size=batch,
        max_size=batch,
    )
    per_sequence = draw(st.booleans())
    return Problem(
        modalities=modalities,
        modality=draw(st.lists(tokens, min_size=length, max_size=length)),
        logits=draw(st.lists(scores, min_size=length, max_size=length)),
        group=tuple(sorted(draw(st.sets(st.sampled_from(everyone), min_size=1)))),
        per_sequence=per_sequence,
        capacity=draw(st.integers(1, length if per_sequence else length * batch)),
        choice=draw(st.sampled_from(("sigmoid", "competitive", "softmax"))),
    )


def rank(logits: Sequence[float], choice: str) -> list[float]:
    """What the experts of a group rank a token by; equal ranks come out equal."""
    if choice == "sigmoid" or len(logits) == 1:
        return list(logits)
    if choice == "competitive":
        return [float(Fraction(logit) - sum(map(Fraction, logits)) / len(logits)) for logit in logits]
    total = math.fsum(math.exp(logit - max(logits)) for logit in logits)
    return [float(f"{logit - max(logits) - math.log(total):.10g}") for logit in logits]


def best(values: dict[int, float], count: int) -> list[int]:
    """The `count` tokens with the largest values; of equal ones the earlier."""
    return sorted(values, key=lambda token: (-values[token], token))[:count]


def actual_capacity(tokens: int, experts: int, factor: Fraction, multiple: int) -> int:
    """Tokens that an expert takes where its group has so many."""
    exact = math.ceil(factor * tokens / experts)
    return min(tokens, math.ceil(Fraction(exact, multiple)) * multiple)


def expert_choice(problem: Problem, capacity: Callable[[int], int] | None = None) -> set[tuple[int, int]]:
    """(expert, token) of every choice.

    Args:
        problem: the tokens.
        capacity: tokens that an expert takes of a scope in which the group has so many; None: `problem.capacity`.
    """
    taken = set()
    for scope in problem.scopes():
        own = [token for token in scope if problem.of_token(problem.member, token)]
        count = problem.capacity if capacity is None else capacity(len(own))
        for expert in range(problem.experts):
            values = {token: problem.ranked(token)[expert] for token in own}
            taken |= {(expert, token) for token in best(values, count)}
    return taken


def cutoffs(problem: Problem, capacity: Callable[[int], int] | None = None) -> tuple[list[float], int]:
    """Of each expert the sum of its cut-offs over the scopes that have a token; and how many those are."""
    sums, number = [0.0] * problem.experts, 0
    for scope in problem.scopes():
        own = [token for token in scope if problem.of_token(problem.member, token)]
        if not own:
            continue
        number += 1
        for expert in range(problem.experts):
            values = sorted((problem.ranked(token)[expert] for token in own), reverse=True)
            count = problem.capacity if capacity is None else capacity(len(own))
            taken, left = values[:count], values[count:]
            sums[expert] += (taken[-1] + (left[0] if left else taken[-1])) / 2
    return sums, number


def depth_choice(
    logits: Sequence[float], modality: Sequence[int], keep: int, quotas: Sequence[int] | None
) -> list[int]:
    """Real tokens of one sequence that a depth layer keeps: each modality's quota first, then the best of the rest."""
    kept: list[int] = []
    for number, quota in enumerate(quotas or ()):
        kept += best({i: logits[i] for i, own in enumerate(modality) if own == number}, quota)
    rest = {i: logits[i] for i, own in enumerate(modality) if own != PADDING and i not in kept}
    return sorted(kept + best(rest, keep - len(kept)))


def calibrated(histogram: Sequence[int], taken: int) -> float:
    """The highest bin edge above which as nearly as possible `taken` scores lie."""
    bins, above = len(histogram), 0
    found, distance = bins, taken
    for edge in reversed(range(bins)):
        above += histogram[edge]
        if abs(above - taken) < distance:
            found, distance = edge, abs(above - taken)
    return found / bins
