"""Contrastive decoding against a loop over tokens, as CM3Leon (arXiv 2309.02591, section 3.1) writes it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from checkpoints_tools.huggingface.shipped import decoding_moma
from checkpoints_tools.huggingface.shipped.guidance_moma import ALPHA, ContrastiveDecoding, contrasted
from mmscale.cli import sample_options
from mmscale.inference.generate import Sampling


def slow(cond: list[float], uncond: list[float], *, k: int, alpha: float) -> list[float]:
    """Scores of one row. -inf in `cond`: the token is excluded from both distributions."""
    left = [t for t, value in enumerate(cond) if value > -math.inf]
    p, q = ({t: math.exp(values[t]) for t in left} for values in (cond, uncond))
    p, q = ({t: value / sum(own.values()) for t, value in own.items()} for own in (p, q))
    largest = sorted(p.values(), reverse=True)
    floor = alpha * largest[min(k, len(largest)) - 1]
    scores = [-math.inf] * len(cond)
    for token in left:
        if p[token] >= floor:
            scores[token] = math.log(p[token]) - math.log(q[token])
    return scores


def rows(size: int) -> Any:
    return st.lists(st.floats(-6, 6, width=32), min_size=size, max_size=size)


CASES = st.integers(2, 9).flatmap(
    lambda size: st.tuples(rows(size), rows(size), st.sets(st.integers(0, size - 1), max_size=size - 1))
)


def fast(cond: list[float], uncond: list[float], *, k: int, alpha: float) -> list[float]:
    made = contrasted(torch.tensor(cond).double(), torch.tensor(uncond).double(), k=k, alpha=alpha)
    found: list[float] = made.tolist()
    return found


@given(CASES, st.integers(1, 12), st.floats(0.01, 1.0))
def test_as_the_paper_writes_it(case: tuple[Any, Any, set[int]], k: int, alpha: float) -> None:
    cond, uncond, excluded = case
    cond = [-math.inf if token in excluded else value for token, value in enumerate(cond)]
    left = sorted((value for value in cond if value > -math.inf), reverse=True)
    floor = left[min(k, len(left)) - 1] + math.log(alpha)
    assume(all(abs(value - floor) > 1e-9 or alpha == 1.0 for value in left))  # else it depends on rounding
    want = slow(cond, uncond, k=k, alpha=alpha)
    assert fast(cond, uncond, k=k, alpha=alpha) == pytest.approx(want, abs=1e-9)


@given(CASES, st.integers(1, 8), st.floats(0.05, 1.0), st.floats(0.05, 1.0))
def test_candidates(case: tuple[Any, Any, set[int]], k: int, alpha: float, other: float) -> None:
    """At least min(k, V); more with a larger k, and with a smaller alpha; a constant changes nothing."""
    cond, uncond, _ = case

    def kept(k: int, alpha: float) -> set[int]:
        found = contrasted(torch.tensor(cond), torch.tensor(uncond), k=k, alpha=alpha)
        return set((~found.isneginf()).nonzero().flatten().tolist())

    assert len(kept(k, alpha)) >= min(k, len(cond))
    assert kept(k, alpha) <= kept(k + 1, alpha)
    assert kept(k, max(alpha, other)) <= kept(k, min(alpha, other))
    assert cond.index(max(cond)) in kept(1, 1.0)


def test_without_the_prompts_effect_all_candidates_are_equal() -> None:
    scores = contrasted(torch.tensor([2.0, 1.0, -3.0]), torch.tensor([2.0, 1.0, -3.0]), k=2, alpha=1.0)
    assert scores.tolist() == [0.0, 0.0, -math.inf]


@pytest.mark.parametrize(("k", "alpha"), [(0, 0.1), (-1, 0.1), (1, 0.0), (1, 1.01), (1, -0.5), (1, math.nan)])
def test_refused(k: int, alpha: float) -> None:
    with pytest.raises(ValueError, match="must be at least 1, and alpha"):
        ContrastiveDecoding(None, k=k, alpha=alpha)  # type: ignore[arg-type]


def test_the_command_has_the_options_and_defaults_of_exports() -> None:
    """The command must not import torch for them, and an export must not import mmscale."""
    assert sample_options.CD_ALPHA == ALPHA == Sampling().cd_alpha
    assert tuple(sample_options.UNCONDITIONAL) == decoding_moma.UNCONDITIONAL
