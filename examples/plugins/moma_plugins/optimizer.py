"""Lion (arXiv 2302.06675): the sign of an interpolated momentum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmscale.extend import HostFusedAdam


class Lion(HostFusedAdam):
    """The optimizer. `optim.beta1` and `optim.beta2` are its two decays; the second moment stays 0.

    Args:
        params: parameter groups.
        cautious: leave out elements whose update and gradient have different signs (arXiv 2411.16085).
        options: of mmscale: lr, betas, eps, weight_decay.
    """

    def __init__(self, params: Any, *, cautious: bool = False, **options: Any) -> None:
        super().__init__(params, **options)
        self.cautious = cautious

    def update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        averages: list[Tensor],
        squares: list[Tensor],
    ) -> None:
        """One step of every shard."""
        lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
        for param, grad, average in zip(params, grads, averages, strict=True):
            direction = torch.sign(beta1 * average + (1.0 - beta1) * grad)
            if self.cautious:
                direction = direction * (direction * grad > 0)
            param.mul_(1.0 - lr * decay).sub_(direction, alpha=lr)
            average.mul_(beta2).add_(grad, alpha=1.0 - beta2)
