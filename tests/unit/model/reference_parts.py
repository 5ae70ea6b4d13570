"""Parts of the slow reference, one token or one score at a time: routing, norms, rotations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from mmscale.config import (
    Config,
    ModelConfig,
)

# Scores that agree in so many digits are ties: repeated tokens are, in layer 0, up to the last bit of a matrix product.
_DIGITS = 7
Choice = dict[tuple[int, int], float]  # (expert, token) -> gate


# --- routing --------------------------------------------------------------------------------------------------------


def capacity_of(config: Config, scope: int, group: str, *, own: int) -> int:
    """Tokens per expert: ceil(factor * tokens / experts) up to a multiple, at least one, at most all.

    Args:
        config: gives the experts.
        scope: tokens of the scope, of which the nominal share counts.
        group: name of the group.
        own: tokens of the group in the scope, which count where capacity is actual.
    """
    experts = config.model.experts
    if experts.capacity == "actual":
        wanted = math.ceil(Fraction(str(experts.capacity_factor)) * own / experts.counts[group])
        return min(own, math.ceil(Fraction(wanted, experts.capacity_multiple)) * experts.capacity_multiple)
    assert experts.share != "auto"
    share = Fraction(1) if config.model.kind == "moe" else Fraction(str(experts.share[group]))
    exact = Fraction(str(experts.capacity_factor)) * scope * share / experts.counts[group]
    multiples = math.ceil(Fraction(math.ceil(exact), experts.capacity_multiple))
    return min(scope, max(1, multiples * experts.capacity_multiple))


def token_room(config: Config, scope: int, group: str) -> int:
    """Tokens that an expert keeps of a scope by token choice; all of them without a limit."""
    experts, settings = config.model.experts, config.model.experts.token_choice
    assert settings is not None and experts.share != "auto"
    if settings.capacity_factor is None:
        return scope
    share = Fraction(1) if config.model.kind == "moe" else Fraction(str(experts.share[group]))
    exact = Fraction(str(settings.capacity_factor)) * settings.top_k * scope * share / experts.counts[group]
    multiples = math.ceil(Fraction(math.ceil(exact), experts.capacity_multiple))
    return min(scope, max(1, multiples * experts.capacity_multiple))


def rank(logits: Sequence[float], choice: str) -> list[float]:
    """What the experts of a group rank one token by."""
    if choice == "sigmoid" or len(logits) == 1:
        return [1 / (1 + math.exp(-logit)) for logit in logits]
    if choice == "competitive":
        return [logit - math.fsum(logits) / len(logits) for logit in logits]
    total = math.fsum(math.exp(logit - max(logits)) for logit in logits)
    return [math.exp(logit - max(logits)) / total for logit in logits]


def choose(
    scores: Sequence[Sequence[float]],
    member: Sequence[bool],
    capacity: int,
    *,
    ranked: Sequence[Sequence[float]] | None = None,
) -> Choice:
    """Expert choice among the tokens of one scope; scores[token][expert] are gates already. Ties: the earlier token.

    `ranked` is what tokens are ranked by, where that is not the gate.
    """
    ranked = scores if ranked is None else ranked
    taken: Choice = {}
    for expert in range(len(scores[0])):
        candidates = [token for token in range(len(scores)) if member[token]]
        candidates.sort(key=lambda token, e=expert: -round(ranked[token][e], _DIGITS))  # type: ignore[misc]
        for token in candidates[:capacity]:
            taken[expert, token] = scores[token][expert]
    return taken


def choose_depth(
    scores: Sequence[float], modality: Sequence[int], keep: int, quotas: Sequence[int] | None
) -> list[int]:
    """Positions that a depth layer takes of one sequence: quotas first, then the best of the others, padding last."""
    order = sorted(range(len(scores)), key=lambda token: -round(scores[token], _DIGITS))
    taken: list[int] = []
    for index, quota in enumerate(quotas or ()):
        taken += [token for token in order if modality[token] == index][:quota]
    rest = [token for token in order if token not in taken]
    rest = [token for token in rest if modality[token] >= 0] + [token for token in rest if modality[token] < 0]
    return sorted((taken + rest)[:keep])


def depth_numbers(config: Config) -> tuple[int, tuple[int, ...] | None]:
    """Tokens per sequence of a depth layer, and each modality's quota of them."""
    settings, length, share = config.model.depth, config.model.seq_length, config.model.experts.share
    assert settings is not None
    kept = math.ceil(Fraction(str(settings.capacity)) * length / settings.multiple) * settings.multiple
    kept = min(length, kept)
    if settings.choice == "mixed":
        return kept, None
    assert share != "auto"
    return kept, tuple(math.floor(Fraction(str(share[name])) * kept) for name in config.vocab.names)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, row by row."""
    rows = [row / torch.sqrt((row * row).sum() / row.numel() + eps) * weight for row in x.reshape(-1, x.shape[-1])]
    return torch.stack(rows).reshape(x.shape)


def turns(i: int, width: int, model: ModelConfig) -> float:
    """Angle per position of components i and i + D/2: base^(-2i/D), divided by `model.rope_scaling`."""
    speed = model.rope_base ** (-2 * i / width)
    scaling = model.rope_scaling
    if scaling is None:
        return speed
    if scaling.rope_type == "linear":
        return speed / scaling.factor
    if scaling.rope_type == "yarn":
        # Number of the angle that turns so often within the original context; arXiv 2309.00071, equation 17 solved for
        # the number, as its authors' code does.
        bounds = []
        for often in (scaling.beta_fast, scaling.beta_slow):
            wavelength = scaling.original_max_position_embeddings / often
            bounds.append(width * math.log(wavelength / (2 * math.pi)) / (2 * math.log(model.rope_base)))
        if scaling.truncate:
            bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
        first, last = max(bounds[0], 0), min(bounds[1], width - 1)
        divided = min(1.0, max(0.0, (i - first) / (last - first)))
        return (1.0 - divided) * speed + divided * speed / scaling.factor
    within = scaling.original_max_position_embeddings * speed / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = min(1.0, max(0.0, (within - low) / (high - low)))
    return kept * speed + (1.0 - kept) * speed / scaling.factor


def rotate(x: Tensor, position: int, model: ModelConfig) -> Tensor:
    """RoPE of a head's vector [D]: components i and i + D/2, as a complex number, turn by position * `turns`.

    YaRN lengthens them, too (arXiv 2309.00071, section 3.4).
    """
    half = x.shape[0] // 2
    angle = torch.tensor([position * turns(i, x.shape[0], model) for i in range(half)], dtype=torch.float64)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    real, imaginary = x[:half], x[half:]
    length, scaling = 1.0, model.rope_scaling
    if scaling is not None and scaling.rope_type == "yarn":
        length = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
    return length * torch.cat((real * cos - imaginary * sin, real * sin + imaginary * cos))


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """(silu(x gate) * (x up)) down with gate and up [H, F] and down [F, H]."""
    inner = x @ gate
    return (inner * torch.sigmoid(inner) * (x @ up)) @ down
