"""Expert Threshold: causal routing by a moving average of each expert's cut-off, without parameters.

Source: arXiv 2603.11535. In training experts choose as usual (expert choice). The cut-off of an expert's choice is the
value (the logit, or the ranking value of `model.experts.choice`) between the last token that it took and the first one
that it did not take. Cut-offs are averaged over steps, and a token goes to the experts whose average its own value
exceeds. This module holds the averages and collects cut-offs; mmscale.train sums them over ranks.

Shapes: S tokens of a sequence, B sequences, E experts of a group, C tokens per expert.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mmscale.model.auxiliary import Fp32Buffers
from mmscale.model.capacity import Slots
from mmscale.model.ranking import Ranking, by_sigmoid
from mmscale.model.step_sums import Key, StepSums


class Thresholds(Fp32Buffers):
    """One fp32 buffer [E] for each group: the averaged cut-off on the scale that tokens are ranked by.

    Args:
        counts: experts of each group.
        rank: ranking function. A buffer is initialised with its values for logits that are all 0.
    """

    def __init__(self, counts: Mapping[str, int], *, rank: Ranking = by_sigmoid) -> None:
        super().__init__()
        for name, count in counts.items():
            self.register_buffer(name, rank(torch.zeros(count)))

    def of(self, name: str) -> Tensor:
        """The thresholds [E] of a group."""
        return self.get_buffer(name)


class Cutoffs(StepSums):
    """Cut-offs of a step's micro-batches on this rank: for each threshold sums [E + 1], the last entry their number."""

    def add(
        self,
        threshold: Tensor,
        ranked: Tensor,
        member: Tensor,
        slots: Slots,
        *,
        per_sequence: bool,
        key: Key,
    ) -> None:
        """Add the cut-offs of one choice.

        Args:
            threshold: the buffer to update.
            ranked: [S, B, E], ranking values.
            member: [S, B] bool, tokens of the group.
            slots: how many tokens were taken of each scope.
            per_sequence: each sequence was a separate scope.
            key: layer, group and micro-batch.
        """
        self.add_once(threshold, key, lambda: cutoffs(ranked, member, slots, per_sequence=per_sequence))


@torch.no_grad()
def cutoffs(ranked: Tensor, member: Tensor, slots: Slots, *, per_sequence: bool) -> Tensor:
    """Sums over the choices of the midpoint between the last token taken and the first one left, fp64 [E + 1].

    If all tokens of the group were taken, it is the lowest value. The last entry is the number of choices with at least
    one token. Arguments as in `Cutoffs.add`.
    """
    experts = ranked.shape[-1]
    ranked = ranked.masked_fill(~member.unsqueeze(-1), float("-inf"))
    if not per_sequence:
        ranked, member = ranked.reshape(-1, 1, experts), member.reshape(-1, 1)
    values = ranked.topk(min(slots.capacity + 1, ranked.shape[0]), dim=0).values  # [C + 1, B, E]
    # Per scope: rows 0 ... limit - 1 of `values` were taken, row `limit` is the best one that was not. With no more
    # tokens than `limit` both indices point to the last token of the group.
    there = member.sum(dim=0)  # [B]
    limit = torch.full_like(there, slots.capacity) if slots.limit is None else slots.limit
    last, following = torch.minimum(there, limit).clamp(min=1) - 1, torch.minimum(there, limit + 1).clamp(min=1) - 1
    between = [values.gather(0, at.view(1, -1, 1).expand(1, -1, experts)).squeeze(0) for at in (last, following)]
    cut = (between[0].double() + between[1].double()) / 2
    cut = torch.where((there > 0).unsqueeze(-1), cut, 0.0).sum(dim=0)
    return torch.cat((cut, (there > 0).sum().double().view(1)))


def move(threshold: Tensor, sums: Tensor, *, decay: float) -> None:
    """Set a threshold to decay * threshold + (1 - decay) * mean cut-off; unchanged if there was no choice.

    Args:
        threshold: [E], changed in place.
        sums: [E + 1] over all ranks, as returned by `cutoffs`.
        decay: of the moving average.
    """
    number = sums[-1]
    mean = sums[:-1] / number.clamp(min=1.0)
    moved = decay * threshold.double() + (1.0 - decay) * mean
    threshold.copy_(torch.where(number > 0, moved, threshold.double()))
