"""Cross entropy from hidden states: logits exist only for a chunk of tokens at a time (`parallel.loss_chunk`).

Backward recomputes each chunk's logits, which costs one more product of the output layer. The values are those of
loss.py: the same formula on the same numbers, chunk by chunk; the weight's gradient is summed in fp32.

Shapes: T tokens, C tokens of a chunk, H hidden width, V vocabulary rows of this tensor-parallel rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mmscale.train.steps.loss import place_labels


class _ChunkedCrossEntropy(torch.autograd.Function):
    """(hidden [T, H], weight [V, H], labels [T]) -> (ce [T], log Z [T]); saves two numbers per token for backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, group: torch.distributed.ProcessGroup, chunk: int
    ) -> tuple[Tensor, Tensor]:
        peaks, targets, totals = [], [], []
        for rows, label in zip(hidden.split(chunk), labels.split(chunk), strict=True):
            peak, target, total = _statistics(rows, weight, label, group)
            peaks.append(peak)
            targets.append(target)
            totals.append(total)
        both = torch.stack((torch.cat(targets), torch.cat(totals)))
        if group.size() > 1:
            torch.distributed.all_reduce(both, group=group)
        target, total = both.unbind(0)
        peak, log_total = torch.cat(peaks), total.log()
        ctx.save_for_backward(hidden, weight, labels, peak, total)
        ctx.group, ctx.chunk = group, chunk
        return log_total - target, log_total + peak

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ce: Tensor, grad_log_z: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, weight, *each = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        tensors = (hidden, grad_hidden, *each, grad_ce, grad_log_z)
        for rows, grad_rows, *part in zip(*(tensor.split(ctx.chunk) for tensor in tensors), strict=True):
            _add_gradients(rows, weight, *part, group=ctx.group, grad_rows=grad_rows, grad_weight=grad_weight)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def _statistics(
    rows: Tensor, weight: Tensor, labels: Tensor, group: torch.distributed.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """For a chunk: the largest logit over all ranks; this rank's part of the label's logit and of Z, relative to it."""
    logits = logits_of(rows, weight)
    peak = logits.amax(dim=-1)
    if group.size() > 1:
        torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX, group=group)
    local, inside = place_labels(labels, rows=weight.shape[0], group=group)
    target = torch.where(inside, logits.gather(-1, local.unsqueeze(-1)).squeeze(-1) - peak, 0.0)
    return peak, target, logits.sub_(peak.unsqueeze(-1)).exp_().sum(dim=-1)


def _add_gradients(
    rows: Tensor,
    weight: Tensor,
    labels: Tensor,
    peak: Tensor,
    total: Tensor,
    grad_ce: Tensor,
    grad_log_z: Tensor,
    *,
    group: torch.distributed.ProcessGroup,
    grad_rows: Tensor,
    grad_weight: Tensor,
) -> None:
    """One chunk of backward: sets its rows of the hidden states' gradient, and adds to the gradient of the weight.

    A separate function, so that all tensors of a chunk are freed before the next one begins.
    """
    local, inside = place_labels(labels, rows=weight.shape[0], group=group)
    softmax = logits_of(rows, weight).sub_(peak.unsqueeze(-1)).exp_().div_(total.unsqueeze(-1))
    scaled = softmax.mul_((grad_ce + grad_log_z).unsqueeze(-1))
    scaled.scatter_add_(-1, local.unsqueeze(-1), torch.where(inside, -grad_ce, 0.0).unsqueeze(-1))
    del softmax
    grad = scaled.to(weight.dtype)
    del scaled
    grad_rows.copy_(grad @ weight)
    if weight.dtype is torch.float32:
        grad_weight.addmm_(grad.t(), rows)
    else:
        grad_weight.add_(grad.t() @ rows.to(weight.dtype))


def logits_of(rows: Tensor, weight: Tensor) -> Tensor:
    """Logits of hidden states [C, H], [C, V] fp32.

    A model in bf16 returns hidden states as fp32 with bf16 values (Float16Module).
    """
    return functional.linear(rows.to(weight.dtype), weight).float()


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, group: torch.distributed.ProcessGroup, *, chunk: int
) -> tuple[Tensor, Tensor]:
    """Cross entropy and log Z of every token, fp32; as `loss.cross_entropy` of the logits `hidden @ weight.T`.

    Args:
        hidden: [B, S, H], the same on all ranks of the group. Its gradient is this rank's part of a sum over them.
        weight: [V, H] of this tensor-parallel rank.
        labels: [B, S] ids in the whole vocabulary.
        group: tensor-parallel ranks.
        chunk: number of tokens whose logits exist at the same time.

    Returns:
        Two tensors [B, S], the same on all ranks of the group.
    """
    flat = hidden.flatten(0, 1)
    ce, log_z = _ChunkedCrossEntropy.apply(flat, weight, labels.flatten(), group, chunk)
    return ce.view(labels.shape), log_z.view(labels.shape)
