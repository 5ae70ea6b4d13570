"""Auxiliary routers: predict, from one token alone, the choices that experts and depth layers make among all tokens.

MoMa (arXiv 2407.21770), section 2.4: sigmoid(SiLU(x W1) W2) per layer and group of experts, and per Mixture-of-Depths
layer, trained by binary cross entropy on the true choice. This module contains the routers, their gradients and their
metrics; optimizer, steps and checkpoints are in mmscale.train.

A Mixture-of-Depths layer has one auxiliary router for all modalities, as it has one main router (paper, section 2.4: W2
is d/2 x 1). Its metrics are still reported per modality.

Shapes: S tokens of this rank's part of a sequence, B sequences, H hidden width, A inner width (H / 2), E decisions per
token (experts of the group; 1 for depth).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from mmscale.model.step_sums import FirstPass

# Bins of the histogram of scores in [0, 1] that thresholds are computed from. Integer counts add up exactly over
# ranks, so thresholds do not depend on the layout.
BINS = 4096
# Names of the entries of a vector of sums, in order.
FIGURES = ("decisions", "predicted", "actual", "hits", "tokens", "without_predicted", "without_actual")


class Fp32Buffers(nn.Module):
    """Buffers stay fp32 when the model is cast: bf16 would move a threshold by up to 0.4 %."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in exact.items():
            moved = self._buffers[name]
            assert value is not None and moved is not None
            self._buffers[name] = value.to(moved.device)
        return self


class AuxiliaryRouter(Fp32Buffers):
    """Logits SiLU(x W1) W2; a decision is sigmoid(logit) > threshold.

    Attributes:
        hidden: [A, H], W1 transposed.
        out: [E, A], W2 transposed.
        threshold: [E] fp32 buffer, in the sigmoid's range; 0.5 as in the paper until it is calibrated.
    """

    threshold: Tensor

    def __init__(self, config: TransformerConfig, *, outputs: int, width: int) -> None:
        super().__init__()
        # RouterLearning computes the gradients, not autograd. The main model's gradient buffers, optimizer and gradient
        # norm therefore do not include the routers.
        hidden, out = (width, config.hidden_size), (outputs, width)
        self.hidden = nn.Parameter(torch.empty(hidden, dtype=config.params_dtype), requires_grad=False)
        self.out = nn.Parameter(torch.empty(out, dtype=config.params_dtype), requires_grad=False)
        for parameter in (self.hidden, self.out):
            # The router sees this rank's tokens only, so gradients are partial sums over tensor-parallel ranks.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.register_buffer("threshold", torch.full((outputs,), 0.5))

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> logits [..., E], fp32. W1 is applied in the parameters' format, W2 in fp32."""
        inner = F.silu(F.linear(hidden.to(self.hidden.dtype), self.hidden).float())
        return F.linear(inner, self.out.float())


@dataclass
class RouterRecord:
    """Sums over the decisions of one router on this rank.

    Attributes:
        router: the router.
        loss: [] fp64, sum of binary cross entropies.
        decisions: [] fp64, number of (token, expert) pairs in `loss`.
        figures: for each modality or group the sums named by FIGURES, fp64.
        histogram: [E, BINS] int64, counts of the scores of its tokens; None unless thresholds are to be calibrated.
        taken: [E] int64, tokens that each expert took in the true choice; None unless thresholds are to be calibrated.
    """

    router: AuxiliaryRouter
    loss: Tensor
    decisions: Tensor
    figures: dict[str, Tensor] = field(default_factory=dict)
    histogram: Tensor | None = None
    taken: Tensor | None = None


class RouterLearning:
    """Receives the true choices of layers, and computes the gradients of the routers or only measures the routers.

    The loss of a layer is differentiated immediately: its input is detached, so no gradient reaches the main model and
    no activation outlives the layer. Pipelines and recompute need no special case.

    Args:
        gradients: add the gradient of the summed cross entropy to the routers' parameters.
        histograms: count scores, for the calibration of thresholds.
    """

    def __init__(self, *, gradients: bool, histograms: bool = False) -> None:
        self.gradients = gradients
        self.histograms = histograms
        self.records: dict[tuple[int, str], RouterRecord] = {}
        self._first_pass = FirstPass()

    def clear(self) -> None:
        """Reset all sums; called at the start of a step."""
        self.records.clear()
        self._first_pass.clear()

    def observe(
        self,
        router: AuxiliaryRouter,
        hidden: Tensor,
        choice: Tensor,
        masks: Mapping[str, Tensor],
        *,
        layer: int,
        kind: str,
        micro_batch: int,
    ) -> None:
        """Learn from one choice and add it to the sums.

        Args:
            router: the router that predicts this choice.
            hidden: [S, B, H], the input of the main router.
            choice: [S, B, E] bool, the true choice.
            masks: [S, B] bool by name of the modality or group; tokens in none of the masks are not counted.
            layer: number of the layer, from 1.
            kind: "experts/<group>" or "depth".
            micro_batch: its number. Recompute repeats every choice; the number is used to count each one once.
        """
        if not self._first_pass.of((layer, kind, micro_batch)):
            return
        member = torch.stack(tuple(masks.values())).any(dim=0).unsqueeze(-1)
        with torch.set_grad_enabled(self.gradients):
            weights = {
                name: weight.detach().requires_grad_(self.gradients) for name, weight in router.named_parameters()
            }
            logits = functional_call(router, weights, (hidden.detach(),))
            loss = F.binary_cross_entropy_with_logits(
                logits, choice.float(), weight=member.float().expand_as(logits), reduction="sum"
            )
            if self.gradients:
                for name, gradient in zip(weights, torch.autograd.grad(loss, tuple(weights.values())), strict=True):
                    _accumulate(router.get_parameter(name), gradient)
        record = self._record(router, (layer, kind))
        scores = torch.sigmoid(logits.detach())
        record.loss += loss.detach().double()
        record.decisions += member.sum() * logits.shape[-1]
        predicted = scores > router.threshold
        for name, mask in masks.items():
            sums = _figures(predicted, choice, mask)
            record.figures[name] = record.figures[name] + sums if name in record.figures else sums
        if record.histogram is not None:
            assert record.taken is not None
            record.histogram += _histogram(scores, member)
            record.taken += (choice & member).sum(dim=(0, 1))

    def _record(self, router: AuxiliaryRouter, key: tuple[int, str]) -> RouterRecord:
        if key not in self.records:
            outputs, where = router.out.shape[0], router.out.device
            zero = torch.zeros((), dtype=torch.float64, device=where)
            record = RouterRecord(router, zero.clone(), zero.clone())
            if self.histograms:
                record.histogram = torch.zeros(outputs, BINS, dtype=torch.int64, device=where)
                record.taken = torch.zeros(outputs, dtype=torch.int64, device=where)
            self.records[key] = record
        return self.records[key]


def _accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add to the parameter's buffer in megatron's gradient buffers, or to `grad` where it has none."""
    if (buffer := getattr(parameter, "main_grad", None)) is not None:
        buffer.add_(gradient)
    else:
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def _figures(predicted: Tensor, choice: Tensor, mask: Tensor) -> Tensor:
    """The sums of FIGURES over the tokens of a mask."""
    own = mask.unsqueeze(-1)
    values = (
        own.expand_as(choice).sum(),
        (predicted & own).sum(),
        (choice & own).sum(),
        (predicted & choice & own).sum(),
        mask.sum(),
        (mask & ~predicted.any(dim=-1)).sum(),
        (mask & ~choice.any(dim=-1)).sum(),
    )
    return torch.stack(values).double()


def _histogram(scores: Tensor, member: Tensor) -> Tensor:
    """Counts [E, BINS] of the members' scores [S, B, E]."""
    outputs = scores.shape[-1]
    bins = (scores * BINS).long().clamp(max=BINS - 1).reshape(-1, outputs).t()
    own = member.reshape(1, -1).expand_as(bins).long()
    return torch.zeros(outputs, BINS, dtype=torch.int64, device=scores.device).scatter_add_(1, bins, own)


def calibrated(histogram: Tensor, taken: Tensor) -> Tensor:
    """Thresholds [E] such that as many scores lie above as the true choice took tokens.

    The closest bin edge is chosen; an expert that took no token gets 1, above every score.

    Args:
        histogram: [E, BINS] over all ranks.
        taken: [E] over all ranks.
    """
    above = histogram.flip(1).cumsum(1).flip(1)  # [E, BINS]: scores in this bin or a higher one
    candidates = torch.cat((above, torch.zeros_like(above[:, :1])), dim=1)
    # Of equal values argmin returns the first one; in the reversed order that is the highest bin edge.
    best = BINS - (candidates.flip(1) - taken.unsqueeze(1)).abs().argmin(dim=1)
    return best.float() / BINS


def routers_of(module: nn.Module) -> list[AuxiliaryRouter]:
    """All auxiliary routers in a module, in the order of its layers."""
    return [part for part in module.modules() if isinstance(part, AuxiliaryRouter)]


def is_routers_key(key: str) -> bool:
    """Whether a key of a state dict belongs to an auxiliary router, its threshold included."""
    return ".mlp.auxiliary." in key or ".depth_auxiliary." in key


def ratios(sums: Tensor) -> dict[str, float]:
    """Ratios from the sums of FIGURES; a ratio that would divide by zero is omitted.

    Returns:
        `accuracy` of single decisions, `precision`, `recall`; `unrouted`, the share of tokens that get no expert, or
        skip the layer, by the auxiliary router, and `per_token`, the mean number of experts; with `_batch`, those of
        the true choice.
    """
    decisions, predicted, actual, hits, tokens, without, without_actual = sums.tolist()
    found = {
        "accuracy": (decisions - predicted - actual + 2 * hits, decisions),
        "precision": (hits, predicted),
        "recall": (hits, actual),
        "unrouted": (without, tokens),
        "unrouted_batch": (without_actual, tokens),
        "per_token": (predicted, tokens),
        "per_token_batch": (actual, tokens),
    }
    return {name: part / whole for name, (part, whole) in found.items() if whole > 0}
