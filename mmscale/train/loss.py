"""Cross entropy and z-loss over a vocabulary that is sharded over tensor-parallel ranks, and their sums per modality.

Formulas: ce = log Z - logit[label]; z-loss = (log Z)^2 (Chameleon, arXiv 2405.09818, section 2.3). Algorithm of the
sharded softmax: as in megatron/core/tensor_parallel/cross_entropy.py, with log Z returned besides.

Shapes: B sequences, S tokens, V vocabulary rows of this rank, M modalities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Loss sums are [M + 1, 2]: row m holds (sum of ce, number) of trained labels of modality m; the last row (sum of
# z-loss, number).


class _CrossEntropy(torch.autograd.Function):
    """(logits, labels) -> (ce, log Z); keeps one softmax for backward."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, group: torch.distributed.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        sharded = group.size() > 1
        rows = logits.shape[-1]
        logits = logits.float()
        peak = logits.amax(dim=-1)
        if sharded:
            torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX, group=group)
        local = labels - group.rank() * rows
        inside = (local >= 0) & (local < rows)
        local = torch.where(inside, local, 0)
        target = torch.where(inside, logits.gather(-1, local.unsqueeze(-1)).squeeze(-1) - peak, 0.0)
        softmax = torch.exp(logits - peak.unsqueeze(-1))
        total = softmax.sum(dim=-1)
        if sharded:
            both = torch.stack((target, total))
            torch.distributed.all_reduce(both, group=group)
            target, total = both.unbind(0)
        softmax.div_(total.unsqueeze(-1))
        log_total = total.log()
        ctx.save_for_backward(softmax, local, inside)
        return log_total - target, log_total + peak

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ce: Tensor, grad_log_z: Tensor) -> tuple[Tensor, None, None]:
        softmax, local, inside = ctx.saved_tensors
        grad = softmax.mul_((grad_ce + grad_log_z).unsqueeze(-1))
        grad.scatter_add_(-1, local.unsqueeze(-1), torch.where(inside, -grad_ce, 0.0).unsqueeze(-1))
        return grad, None, None


def cross_entropy(logits: Tensor, labels: Tensor, group: torch.distributed.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Cross entropy and log Z of every token, fp32.

    Args:
        logits: [B, S, V] of this tensor-parallel rank.
        labels: [B, S] ids in the whole vocabulary.
        group: tensor-parallel ranks.

    Returns:
        Two tensors [B, S], the same on all ranks of the group.
    """
    ce, log_z = _CrossEntropy.apply(logits, labels, group)
    return ce, log_z


@dataclass(frozen=True)
class Objective:
    """What is minimised: sum over trained labels of weight[modality] * ce + z_loss * (log Z)^2, over their number.

    Attributes:
        modalities: M.
        weights: weight of each modality's labels.
        z_loss: weight of the z-loss.
    """

    modalities: int
    weights: tuple[float, ...]
    z_loss: float

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        label_modality: Tensor,
        mask: Tensor,
        group: torch.distributed.ProcessGroup,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The objective's sum over a micro-batch.

        Args:
            logits: [B, S, V] of this rank.
            labels: [B, S] ids.
            label_modality: [B, S] int8, modality of the label.
            mask: [B, S], 1 where the label is trained on.
            group: tensor-parallel ranks.

        Returns:
            The sum to differentiate; the number of trained labels (int32, as megatron's schedules want it); loss sums
            [M + 1, 2].
        """
        ce, log_z = cross_entropy(logits, labels, group)
        own = torch.stack([mask * (label_modality == m) for m in range(self.modalities)])  # [M, B, S]
        sums, counts = (own * ce).sum(dim=(1, 2)), own.sum(dim=(1, 2))
        squared, number = (mask * log_z.square()).sum(), counts.sum()
        # Python numbers, not a tensor of them: that would be copied to the device, and waited for.
        weighted = torch.stack([weight * part for weight, part in zip(self.weights, sums.unbind(), strict=True)])
        loss = weighted.sum() + self.z_loss * squared
        report = torch.stack((torch.cat((sums, squared[None])), torch.cat((counts, number[None]))), dim=1)
        return loss, number.to(torch.int32), report.detach()
