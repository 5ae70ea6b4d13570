"""Ranking functions of expert choice: a table with one function for each `model.experts.choice`.

They affect only the order of tokens: the gate is the sigmoid of the router's logit under every choice. Averaged
cut-offs (Expert Threshold) are on the scale of the ranking. The exported model has the same functions
(checkpoints_tools/huggingface/shipped/modeling_moma.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Ranking = Callable[[Tensor], Tensor]


def by_sigmoid(logits: Tensor) -> Tensor:
    """Each expert ranks tokens by its own logit, which gives the order of the sigmoids.

    MoMa (arXiv 2407.21770), section 2.2.

    Args:
        logits: [..., E] fp32, of all experts of one group.

    Returns:
        [..., E] fp32; an expert takes the tokens with the largest values.
    """
    return logits


def by_advantage(logits: Tensor) -> Tensor:
    """The logit minus the mean over the group's experts: tokens that this expert prefers more than the others do.

    Arguments and result as for `by_sigmoid`. Computed in fp64, so that tokens with equal logits stay equal. If a group
    has one expert, it ranks by its logit.
    """
    experts = logits.shape[-1]
    if experts == 1:
        return logits
    exact = logits.double()
    return ((exact * experts - exact.sum(dim=-1, keepdim=True)) / experts).float()


def by_softmax(logits: Tensor) -> Tensor:
    """The logarithm of the softmax over the group's experts. Source: expert choice, arXiv 2202.09368, section 3.2.

    Arguments and result as for `by_sigmoid`. The logarithm keeps the order and does not saturate. Computed in fp64. If
    a group has one expert, it ranks by its logit.
    """
    if logits.shape[-1] == 1:
        return logits
    return torch.log_softmax(logits.double(), dim=-1).float()


RANKINGS: dict[str, Ranking] = {"sigmoid": by_sigmoid, "competitive": by_advantage, "softmax": by_softmax}
