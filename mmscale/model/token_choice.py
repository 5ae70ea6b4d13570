"""Token choice: every token goes to the experts of its group with the highest scores, balanced by biases.

The rule of most other projects, as a baseline for expert choice. Scores and gates are those of megatron-core's router
(moe_utils.py, topk_routing_with_score_function); biases those of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2; arXiv
2408.15664), for each group of experts. A choice depends on the token alone, so that every routing mode gives the same
result. The parameters of the experts, and the exchange with their ranks, are those of expert choice (moma.py).

Shapes: S tokens of a sequence, B sequences of the micro-batch, E experts of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmscale.config.derived import expert_capacity
from mmscale.model.auxiliary import Fp32Buffers
from mmscale.model.exchange import largest_everywhere
from mmscale.model.mixed_modal import MixedModalParams
from mmscale.model.moma_settings import ExpertGroup, MoMaSettings
from mmscale.model.routing import Selection, decided
from mmscale.model.routing_figures import report_choice

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: torch.softmax(logits, dim=-1),
}
_NOTHING = 1e-20  # added to sums of scores, as in megatron-core: sigmoids of very negative logits are 0


def best_experts(scores: Tensor, bias: Tensor, top_k: int) -> Tensor:
    """The experts of each token: those with the highest score + bias; of equal ones the first.

    Args:
        scores: [S, B, E] fp32.
        bias: [E] fp32.
        top_k: experts of a token, at most E.

    Returns:
        [S, B, E] bool.
    """
    order = (scores.detach() + bias).sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def gates(scores: Tensor, taken: Tensor, top_k: int) -> Tensor:
    """The weights of the experts' outputs, [S, B, E] fp32: biases have no part in them.

    The score of an expert, divided by the sum over the token's experts if there are several. A single one is not
    divided: its gate would always be 1, and the router would get no gradient.

    Args:
        scores: [S, B, E] fp32.
        taken: [S, B, E] bool, the token's experts.
        top_k: number of experts that a token chose.
    """
    own = scores * taken
    return own / (own.sum(dim=-1, keepdim=True) + _NOTHING) if top_k > 1 else own


def earliest(taken: Tensor, capacity: int, *, per_sequence: bool) -> Tensor:
    """The tokens that each expert keeps: its first `capacity` ones of each sequence, or of the micro-batch.

    The first ones, because a choice by score would depend on later tokens.

    Args:
        taken: [S, B, E] bool.
        capacity: tokens that an expert keeps.
        per_sequence: of each sequence; otherwise of the micro-batch in the order of token numbers s * B + b.

    Returns:
        [S, B, E] bool.
    """
    if per_sequence:
        return taken & (taken.cumsum(dim=0) <= capacity)
    flat = taken.flatten(0, 1)
    return (flat & (flat.cumsum(dim=0) <= capacity)).view(taken.shape)


def balance(bias: Tensor, loads: Tensor, *, rate: float) -> None:
    """Raise the biases of experts with fewer tokens than the mean by `rate`, and lower those of experts with more.

    Equals megatron-core's get_updated_expert_bias (moe_utils.py). Whole numbers are compared, so that the result does
    not depend on rounding.

    Args:
        bias: [E] fp32, changed in place.
        loads: [E] fp64, tokens of a whole step, or a multiple of them.
        rate: model.experts.token_choice.bias_rate.
    """
    bias.add_((loads.sum() - loads * loads.numel()).sign().to(bias.dtype), alpha=rate)


class TokenChoice(Fp32Buffers):
    """The choice of a layer's tokens among the experts of their groups, with one bias [E] for each group.

    Args:
        settings: of the layer; `settings.token_choice` is set.
        ranks: expert-parallel ranks.
    """

    def __init__(self, settings: MoMaSettings, ranks: torch.distributed.ProcessGroup) -> None:
        super().__init__()
        assert settings.token_choice is not None
        self.settings, self.choice, self.ranks = settings, settings.token_choice, ranks
        for group in settings.groups:
            self.register_buffer(group.name, torch.zeros(group.experts))

    def select(
        self, logits: Sequence[tuple[ExpertGroup, Tensor]], params: MixedModalParams, *, layer: int
    ) -> list[Selection]:
        """The slots of every group's experts, the same number on all expert-parallel ranks. All of them call it.

        Without a limit every expert gets as many slots as the fullest one of its group on any rank needs. Their number
        is read from the device, once for all groups.

        Args:
            logits: the groups with the main router's logits [S, B, E] fp32.
            params: the micro-batch; receives metrics and loads.
            layer: its number, from 1.
        """
        score, top_k = SCORES[self.choice.scores], self.choice.top_k
        weights, kept = [], []
        for group, own in logits:
            bias, scores = self.get_buffer(group.name), score(own)
            taken = best_experts(scores, bias, top_k) & params.tokens_of(group.modalities).unsqueeze(-1)
            if params.choices is not None:
                taken = params.choices.tokens(taken, micro_batch=params.noise_key, place=(layer, group.name))
            if params.loads is not None:
                params.loads.add(bias, taken, key=(layer, group.name, params.noise_key))
            weights.append(gates(scores, taken, top_k))
            kept.append(self._limited(group, taken))
            if params.stats is not None:
                chosen = taken.sum()
                dropped = 1.0 - kept[-1].sum() / chosen.clamp(min=1)
                name = f"experts/{group.name}/dropped_fraction"
                params.stats.add(layer, name, dropped, weight=chosen, micro_batch=params.noise_key)
        selections = []
        for (group, _), own, gate, slots in zip(logits, kept, weights, self._slots(kept), strict=True):
            selection = decided(own, gate, slots)
            if params.stats is not None:
                report_choice(params, layer, group, selection)
            selections.append(selection)
        return selections

    def _capacity(self, group: ExpertGroup, length: int, batch: int) -> int | None:
        """Tokens that an expert keeps of a sequence or of the micro-batch; None: all of them."""
        factor = self.choice.capacity_factor
        if factor is None or not self.training:
            return None
        scope = length if self.settings.per_sequence else length * batch
        return expert_capacity(
            scope,
            group.share,
            group.experts,
            factor=factor * self.choice.top_k,
            multiple=self.settings.capacity_multiple,
            limit=scope,
        )

    def _limited(self, group: ExpertGroup, taken: Tensor) -> Tensor:
        capacity = self._capacity(group, *taken.shape[:2])
        return taken if capacity is None else earliest(taken, capacity, per_sequence=self.settings.per_sequence)

    def _slots(self, kept: Sequence[Tensor]) -> list[int]:
        """Slots of an expert of each group."""
        length, batch, _ = kept[0].shape
        capacities = [self._capacity(group, length, batch) for group in self.settings.groups]
        limits = [capacity * (batch if self.settings.per_sequence else 1) for capacity in capacities if capacity]
        if len(limits) == len(capacities):
            return limits
        most = largest_everywhere(torch.stack([taken.sum(dim=(0, 1)).max() for taken in kept]), self.ranks)
        multiple = self.settings.capacity_multiple
        return [-(-max(1, count) // multiple) * multiple for count in most]
