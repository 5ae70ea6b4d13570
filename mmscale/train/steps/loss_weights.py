"""Loss-based weights of documents in the training loss (Sow et al. 2025, arXiv 2502.06733), a `StepObserver`.

The loss l of a document is the mean cross entropy of its trained labels of one modality, so a mixed document has one
loss and one weight for each modality:

    h = (2 l - high - low) / (high - low), clipped to [-1, 1]
    weight = min(exp((f(h) - 1) / temperature) / mean, largest)

f is a function of the table `LOSS_WEIGHTS`; low and high are the 1 % and 99 % quantiles of the losses of a modality,
and mean is the mean of the exponential over labels. The paper takes them from the same batch, so its weights depend on
how a batch is split over ranks and micro-batches. Here they are moving averages over earlier steps of all ranks:
weights need no second pass and are those of one process under every layout. Sums of losses and histograms are integers,
so they do not depend on the order of additions.

Only an applied step moves the averages. Weights multiply the cross entropy and not the z-loss; the loss is still
divided by the number of labels.

M modalities, B sequences, S tokens of a sequence, N tokens of this context-parallel rank, D = B * S places of
documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from mmscale.config import Config
from mmscale.config.train.schema import LossWeightsConfig
from mmscale.runtime import device
from mmscale.train.steps.batch import Batch

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linupper": lambda h: (h + 1.0).clamp(max=1.0),
    "quadratic": lambda h: 1.0 - h.square(),
    "extremes": torch.abs,
}
QUANTILE = 0.01  # `low`; `high` is that of 1 - QUANTILE
BINS, WIDTH = 2048, 16.0 / 2048  # of the histogram of losses [nats]; larger losses count in the last bin
_NAT = 2.0**30  # units of a sum of losses
_DOCUMENT = 2.0**16  # units of a document, which is divided between two bins
_TINY = 1e-6
LOW, HIGH, MEAN, UPDATES = range(4)  # columns of the state
# Columns of the moments of a step, sums over documents: 1, weight, its square, length, its square, both products.
_NUMBER, _WEIGHT, _SQUARE, _LENGTH, _LENGTH2, _TOGETHER, _RAW = range(7)


class LossWeights:
    """Gives weights to a step's labels, and moves the averages that they are computed from.

    Args:
        settings: `train.loss_weights`.
        names: modalities.
        groups: process groups.

    Attributes:
        state: float64 [M, 4]: averages of `low`, `high` and `mean`, and the number of updates. The same on all ranks.
    """

    def __init__(self, settings: LossWeightsConfig, names: Sequence[str], groups: ProcessGroupCollection) -> None:
        self._settings, self._names, self._groups = settings, names, groups
        self.state = torch.zeros(len(names), 4, dtype=torch.float64, device=device.taken())
        self._last: Tensor | None = None
        self.begin(())

    def begin(self, batches: Sequence[Batch]) -> None:
        """Forget the sums of an earlier batch."""
        del batches
        self._histogram = self.state.new_zeros(len(self._names), BINS)
        self._moments = self.state.new_zeros(len(self._names), 7)

    @torch.no_grad()
    def weights(self, batch: Batch, ce: Tensor) -> Tensor:
        """The weight of every label, fp32 [B, N]; 0 where no label is trained on. The last pipeline stage calls it.

        Args:
            batch: a micro-batch.
            ce: cross entropy [B, N].
        """
        place = _places(batch)
        own = torch.stack([(batch.label_modality == m) & (batch.loss_mask > 0) for m in range(len(self._names))])
        losses, lengths = self._losses(ce, own, place, documents=batch.params.document_ids.numel())
        raw = self._raw(losses)
        weight = self._bounded(raw)
        self._collect(losses, lengths, raw, weight)
        each = weight.gather(1, place.reshape(1, -1).expand(len(self._names), -1)).view(own.shape)
        return (each * own).sum(dim=0).float()

    @torch.no_grad()
    def finish(self, *, lr: float) -> None:
        """Move the averages, with one reduction over data-parallel ranks; every rank calls it."""
        del lr
        sums = torch.cat((self._histogram, self._moments), dim=1)
        torch.distributed.all_reduce(sums, group=self._groups.dp)
        if self._groups.pp.size() > 1:  # only the last stage has seen losses
            last = torch.distributed.get_global_rank(self._groups.pp, self._groups.pp.size() - 1)
            torch.distributed.broadcast(sums, src=last, group=self._groups.pp)
        histogram, self._last = sums.split((BINS, 7), dim=1)
        self.state.copy_(moved(self.state, histogram, self._last, decay=self._settings.decay))

    def figures(self) -> dict[str, float]:
        """Figures of the last applied step for metrics.jsonl, by modality; reads from the device."""
        if self._last is None:
            return {}
        found: dict[str, float] = {}
        for name, moments, (low, high, *_) in zip(self._names, self._last.tolist(), self.state.tolist(), strict=True):
            if moments[_NUMBER] > 0:
                own = {"low": low, "high": high} | _figures(moments)
                found |= {f"loss_weights/{figure}/{name}": value for figure, value in own.items()}
        return found

    def plain(self) -> list[list[float]]:
        """The state for a checkpoint; reads from the device."""
        found: list[list[float]] = self.state.tolist()
        return found

    def restore(self, plain: Any) -> None:
        """Restore the result of `plain`; None: begin without averages."""
        self._last = None
        self.state.copy_(torch.zeros_like(self.state) if plain is None else torch.tensor(plain, dtype=torch.float64))

    def _losses(self, ce: Tensor, own: Tensor, place: Tensor, *, documents: int) -> tuple[Tensor, Tensor]:
        """Mean loss of each document, float64 [M, D], and its number of labels, int64 [M, D]."""
        amounts = torch.stack([(ce.double() * _NAT).round().long() * own, own.long()])  # [2, M, B, N]
        sums = torch.zeros(2, len(own), documents, dtype=torch.int64, device=ce.device)
        sums.scatter_add_(2, place.reshape(1, 1, -1).expand(2, len(own), -1), amounts.flatten(2))
        if self._groups.cp.size() > 1:
            torch.distributed.all_reduce(sums, group=self._groups.cp)
        total, lengths = sums.unbind()
        return total.double() / _NAT / lengths.clamp(min=1), lengths

    def _raw(self, losses: Tensor) -> Tensor:
        """exp((f(h) - 1) / temperature), in (0, 1]."""
        low, high = self.state[:, LOW, None], self.state[:, HIGH, None]
        h = ((2.0 * losses - high - low) / (high - low).clamp(min=_TINY)).clamp(-1.0, 1.0)
        return ((FUNCTIONS[self._settings.kind](h) - 1.0) / self._settings.temperature).exp()

    def _bounded(self, raw: Tensor) -> Tensor:
        """Weights [M, D]; 1 until there are `warmup` updates of the modality's averages."""
        weight = (raw / self.state[:, MEAN, None].clamp(min=_TINY)).clamp(max=self._settings.largest)
        return torch.where(self.state[:, UPDATES, None] >= max(2, self._settings.warmup), weight, 1.0)

    def _collect(self, losses: Tensor, lengths: Tensor, raw: Tensor, weight: Tensor) -> None:
        there = (lengths > 0).double()
        at = losses / WIDTH - 0.5  # in bins, from the centre of the first one
        lower = at.floor().clamp(0, BINS - 2)
        upper = ((at - lower).clamp(0.0, 1.0) * _DOCUMENT).round()
        self._histogram.scatter_add_(1, lower.long(), (_DOCUMENT - upper) * there)
        self._histogram.scatter_add_(1, lower.long() + 1, upper * there)
        length = lengths.double()
        columns = (torch.ones_like(weight), weight, weight**2, length, length**2, weight * length, raw * length)
        self._moments += torch.stack([(column * there).sum(dim=1) for column in columns], dim=1)


def _places(batch: Batch) -> Tensor:
    """The place of each token's document among D, int64 [B, N]."""
    ids = batch.params.document_ids  # [S, B], whole sequences
    own = (ids if batch.params.context is None else batch.params.context.local(ids)).t().long()
    return own + torch.arange(len(own), device=own.device)[:, None] * len(ids)


def moved(state: Tensor, histogram: Tensor, moments: Tensor, *, decay: float) -> Tensor:
    """The state after a step. Modalities without documents stay as they are; the first steps weigh equally.

    Args:
        state: [M, 4].
        histogram: [M, BINS] of the losses of all documents of the step.
        moments: [M, 7] sums over them.
        decay: of the moving averages.
    """
    updates = state[:, UPDATES]
    # The first step has no quantiles yet, so its exponentials are no part of the mean.
    past = torch.stack((updates, updates, (updates - 1.0).clamp(min=0.0)), dim=1)
    kept = (past / (past + 1.0)).clamp(max=decay)
    kept[:, MEAN] = torch.where(updates > 0, kept[:, MEAN], 1.0)
    mean = moments[:, _RAW] / moments[:, _LENGTH].clamp(min=1.0)
    new = torch.stack((quantile(histogram, QUANTILE), quantile(histogram, 1.0 - QUANTILE), mean), dim=1)
    result = torch.cat((kept * state[:, :UPDATES] + (1.0 - kept) * new, updates[:, None] + 1.0), dim=1)
    return torch.where(moments[:, _NUMBER, None] > 0, result, state)


def quantile(histogram: Tensor, share: float) -> Tensor:
    """The loss below which a share of the documents lies, linear inside a bin, [M]."""
    below = histogram.cumsum(dim=1)
    wanted = share * below[:, -1:]
    at = torch.searchsorted(below, wanted).clamp(max=BINS - 1)
    inside = (wanted - below.gather(1, at)) / histogram.gather(1, at).clamp(min=1.0) + 1.0
    return ((at + inside.clamp(0.0, 1.0)) * WIDTH).squeeze(1)


def _figures(moments: Sequence[float]) -> dict[str, float]:
    """Effective share of the documents, mean weight of a label, and correlation of weight and length."""
    number, weight, square, length, length2, together, _ = moments
    covariance = together / number - weight * length / number**2
    spread = max(0.0, square / number - (weight / number) ** 2) * max(0.0, length2 / number - (length / number) ** 2)
    return {
        "effective_share": min(1.0, weight**2 / (number * square)),  # equal weights give 1 up to rounding
        "mean": together / length,
        "length_correlation": covariance / spread**0.5 if spread > 1e-12 else 0.0,
    }


def loss_weights_of(config: Config, groups: ProcessGroupCollection) -> LossWeights | None:
    """The observer that a configuration requests; None: labels have no such weights."""
    settings = config.train.loss_weights
    return None if settings is None else LossWeights(settings, config.vocab.names, groups)
