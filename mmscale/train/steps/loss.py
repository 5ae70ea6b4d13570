"""Cross entropy and z-loss over a vocabulary that is sharded over tensor-parallel ranks, and their sums per modality.

Formulas: ce = log Z - logit[label]; z-loss = (log Z)^2 (Chameleon, arXiv 2405.09818, section 2.3). The sharded softmax
is computed as in megatron/core/tensor_parallel/cross_entropy.py, and log Z is returned too.

Shapes: B sequences, S tokens, V vocabulary rows of this rank, M modalities, P places, N requested tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmscale.config import Config
from mmscale.data.stream.answer_requests import WantedTokens
from mmscale.tables import plugins
from mmscale.tables.plugins import Use
from mmscale.tables.settings import LOSSES

# Loss sums are [M + 1, 2]: row m holds (sum of ce, number) of the trained labels of modality m; the last row holds
# (sum of z-loss, number) of all trained labels. Evaluations append rows of conditional losses.


class _CrossEntropy(torch.autograd.Function):
    """(logits, labels) -> (ce, log Z); saves one softmax for backward."""

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
        local, inside = place_labels(labels, rows=rows, group=group)
        target = torch.where(inside, logits.gather(-1, local.unsqueeze(-1)).squeeze(-1) - peak, 0.0)
        softmax = (logits - peak.unsqueeze(-1)).exp_()
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


def place_labels(labels: Tensor, *, rows: int, group: torch.distributed.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The row of each label in this rank's shard of the vocabulary, and a mask of the labels of other ranks (row 0).

    Args:
        labels: ids in the whole vocabulary.
        rows: V.
        group: tensor-parallel ranks.
    """
    local = labels - group.rank() * rows
    inside = (local >= 0) & (local < rows)
    return torch.where(inside, local, 0), inside


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


def picked(
    outputs: Tensor,
    wanted: WantedTokens,
    group: torch.distributed.ProcessGroup,
    *,
    logits: Callable[[Tensor], Tensor] = Tensor.float,
    chunk: int = 0,
) -> Tensor:
    """Log-probabilities of single tokens, fp32.

    Args:
        outputs: [B, S, V] logits of this tensor-parallel rank, or the input of `logits`.
        wanted: places and tokens.
        group: tensor-parallel ranks.
        logits: computes fp32 logits [P, V] from outputs at places.
        chunk: number of places whose logits exist at the same time; 0: all.

    Returns:
        [N, 2], the same on all ranks of the group: log-probability of each token, and 1 if it is the most likely one.
    """
    device = outputs.device
    rows, positions, places, tokens = (
        torch.from_numpy(one).to(device) for one in (wanted.rows, wanted.positions, wanted.places, wanted.tokens)
    )
    at = outputs[rows, positions]
    peak_P, total_P = torch.zeros(2, len(at), device=device)
    target = torch.zeros(len(tokens), device=device)
    size = chunk or max(1, len(at))
    for first in range(0, len(at), size):
        part = slice(first, first + size)
        at_PV = logits(at[part])
        peak_P[part] = at_PV.amax(dim=-1)
        if group.size() > 1:
            torch.distributed.all_reduce(peak_P[part], op=torch.distributed.ReduceOp.MAX, group=group)
        # The host knows which tokens are requested, so nothing waits for the device.
        own = torch.from_numpy(np.flatnonzero((wanted.places >= part.start) & (wanted.places < part.stop))).to(device)
        local, inside = place_labels(tokens[own], rows=at_PV.shape[-1], group=group)
        target[own] = torch.where(inside, at_PV[places[own] - first, local], 0.0)
        total_P[part] = at_PV.sub_(peak_P[part, None]).exp_().sum(dim=-1)
    if group.size() > 1:
        torch.distributed.all_reduce(total_P, group=group)
        torch.distributed.all_reduce(target, group=group)
    peak = peak_P[places]
    return torch.stack((target - peak - total_P.log()[places], (target >= peak).float()), dim=1)


class Loss(Protocol):
    """The objective for a micro-batch; plug-ins of `train.loss` make one."""

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        label_modality: Tensor,
        mask: Tensor,
        group: torch.distributed.ProcessGroup,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Objective.__call__`."""


@dataclass(frozen=True)
class Objective:
    """The built-in objective: mean over trained labels of weight[modality] * ce + z_loss * (log Z)^2.

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
        return self.of_tokens(*cross_entropy(logits, labels, group), label_modality, mask)

    def of_tokens(
        self,
        ce: Tensor,
        log_z: Tensor,
        label_modality: Tensor,
        mask: Tensor,
        *,
        given: Tensor | None = None,
        token_weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `__call__`, from the cross entropy and log Z of every token, [B, S].

        `token_weights` [B, S] multiply the cross entropy in the sum to differentiate, not in the loss sums.
        With `given` [M - 1, B, S] (`conditional_labels`) the loss sums have M * (M - 1) more rows, in the order of
        `conditional_names`.
        """
        own = torch.stack([mask * (label_modality == m) for m in range(self.modalities)])  # [M, B, S]
        sums, counts = (own * ce).sum(dim=(1, 2)), own.sum(dim=(1, 2))
        squared, number = (mask * log_z.square()).sum(), counts.sum()
        # The weights are Python numbers; a tensor of them would have to be copied to the device, which waits.
        parts = sums if token_weights is None else (own * (token_weights * ce)).sum(dim=(1, 2))
        weighted = torch.stack([weight * part for weight, part in zip(self.weights, parts.unbind(), strict=True)])
        loss = weighted.sum() + self.z_loss * squared
        report = torch.stack((torch.cat((sums, squared[None])), torch.cat((counts, number[None]))), dim=1)
        if given is not None:
            both = given.unsqueeze(1) * own
            conditional = torch.stack(((both * ce).sum(dim=(2, 3)), both.sum(dim=(2, 3))), dim=-1)
            report = torch.cat((report, conditional.flatten(0, 1)))
        return loss, number.to(torch.int32), report.detach()


def loss_of(config: Config, objective: Objective) -> Loss:
    """The objective of the main stage.

    Args:
        config: `train.loss`.
        objective: the built-in objective, which is passed to a plug-in.

    Raises:
        PluginError: the plug-in cannot be used.
    """
    if config.train.loss in LOSSES:
        return objective
    made: Loss = plugins.make(Use("loss", "train.loss", config.train.loss, config.train.loss_args), objective)
    return made
