"""How each causal routing mode decides: a table with one entry for each causal mode of mmscale.tables.routings.

A decision depends on one token alone. The layers, which own the routers, compute the values that it is based on: the
scores of the auxiliary routers, or the values by which the main router ranks tokens.

Shapes: E experts of a group; 1 for a Mixture-of-Depths layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mmscale.tables.routings import Routing

Decide = Callable[[Tensor, Tensor], Tensor]


def above_probability(scores: Tensor, threshold: Tensor) -> Tensor:
    """Experts whose sigmoid is above its threshold (MoMa, section 2.4).

    Args:
        scores: [..., E] logits of an auxiliary router.
        threshold: [E] in the sigmoid's range.

    Returns:
        [..., E] bool.
    """
    return torch.sigmoid(scores) > threshold


def above_cutoff(ranked: Tensor, cutoff: Tensor) -> Tensor:
    """Experts whose ranking value is above its averaged cut-off [E] (Expert Threshold, arXiv 2603.11535)."""
    return ranked > cutoff


def best(scores: Tensor, threshold: Tensor) -> Tensor:
    """The one expert with the highest score: [..., E] -> bool [..., E]. Thresholds are not used."""
    return F.one_hot(scores.argmax(dim=-1), scores.shape[-1]).bool()


@dataclass(frozen=True)
class Decision:
    """The functions with which a mode decides.

    Attributes:
        experts: which experts of a group take a token.
        depth: whether a Mixture-of-Depths layer processes a token.
    """

    experts: Decide
    depth: Decide


DECISIONS: dict[Routing, Decision] = {
    Routing.CAUSAL: Decision(above_probability, above_probability),
    Routing.TOP1: Decision(best, above_probability),
    Routing.THRESHOLD: Decision(above_cutoff, above_cutoff),
}
