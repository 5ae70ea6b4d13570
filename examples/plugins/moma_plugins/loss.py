"""Focal loss (arXiv 1708.02002): tokens that the model predicts well count less."""

from __future__ import annotations

import torch
from torch import Tensor

from mmscale.extend import Objective, cross_entropy


class FocalLoss:
    """sum of mask * (1 - p)^gamma * ce over the micro-batch, p being the probability of the label.

    Args:
        objective: the built-in loss: modalities, weights and z-loss of the configuration.
        gamma: 0 is cross entropy.
    """

    def __init__(self, objective: Objective, *, gamma: float = 2.0) -> None:
        self.objective, self.gamma = objective, gamma

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        label_modality: Tensor,
        mask: Tensor,
        group: torch.distributed.ProcessGroup,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Objective.__call__`; what is logged stays cross entropy."""
        with torch.no_grad():
            _, number, report = self.objective(logits, labels, label_modality, mask, group)
        ce, _ = cross_entropy(logits, labels, group)
        weight = (1.0 - torch.exp(-ce.detach())) ** self.gamma
        return (mask * weight * ce).sum(), number, report
