"""Expert choice and depth choice: pure tensor functions, no parameters and no process groups.

Formulas: MoMa (arXiv 2407.21770), section 2.2 and 2.3; Mixture-of-Depths (arXiv 2404.02258).

Shapes: S tokens of a sequence, B sequences of the micro-batch, E experts of a group, C tokens per expert (of a sequence
or of the micro-batch), K tokens that a depth layer selects. Tokens are numbered s * B + b, as in a flattened [S, B,
...] tensor.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mmscale.model.capacity import Slots
from mmscale.model.ranking import Ranking, by_sigmoid

# Tokens are ranked by logits, not by sigmoids: fp32 sigmoids near 1 have a resolution of 1e-7 only, and above a logit
# of 17 all of them are 1. Tokens that do not belong to the group get this value and are ranked last.
_FOREIGN = float("-inf")
# Number of the lowest mantissa bits of a logit (of 23) that a choice ignores.
_NOISE_BITS = 10


def _best(ranked: Tensor, count: int) -> Tensor:
    """Positions along dim 0 of the `count` largest values; values that differ only by rounding count as equal.

    Ties are common: every document's first token has the same hidden state in all layers, and in layer 0 every repeated
    token has. Their logits are equal, or differ in the last bit depending on vectorization, so the choice among them
    would differ between layouts (this caused a jump of 1e-5 in the loss of an EP2 run: logits 0.31037587 and 0.31037584
    where one process had equal ones). Therefore the lowest bits, a relative 1e-4, are dropped, and of equal values the
    one at the lower position comes first.
    """
    if ranked.is_cuda:
        return _coarse(ranked).sort(dim=0, descending=True, stable=True).indices[:count]
    return _best_on_host(ranked, count)


def _best_on_host(ranked: Tensor, count: int) -> Tensor:
    """The same positions as a stable descending sort, in a third to a half of its time (docs/performance.md).

    A host sorts stably by comparing pairs of value and index. Here value and position are one integer, so no two are
    equal, and the largest ones are found without sorting the rest.
    """
    # Integers in the order of the floats: for negative ones the order of the bits is reversed. Adding 0 makes -0 a 0.
    bits = _coarse(ranked + 0.0).view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long().flatten(1).t()  # [columns, positions]
    keys = (ordered << 32) - torch.arange(ranked.shape[0], device=ranked.device)
    best = keys.topk(min(count, ranked.shape[0]), dim=-1).values
    return (-best & 0xFFFFFFFF).t().reshape(-1, *ranked.shape[1:])


def _coarse(values: Tensor) -> Tensor:
    """fp32 values with the lowest mantissa bits, in which rounding may differ, set to zero."""
    return (values.contiguous().view(torch.int32) & (-1 << _NOISE_BITS)).view(torch.float32)


class Selection(NamedTuple):
    """The tokens that each expert takes.

    Attributes:
        token: [E, slots] int64, flat token numbers, distinct for each expert.
        gate: [E, slots] fp32, the weight of the expert's output; 0 in empty slots.
        valid: [E, slots] bool, the slot holds a token of the group; otherwise it is empty.
    """

    token: Tensor
    gate: Tensor
    valid: Tensor


def expert_choice(
    logits: Tensor, member: Tensor, slots: Slots, *, per_sequence: bool, rank: Ranking = by_sigmoid
) -> Selection:
    """Every expert takes its best tokens; the gate is the sigmoid of the logit, not renormalised.

    Args:
        logits: [S, B, E] fp32.
        member: [S, B] bool, tokens of the group; others get gate 0 if they fill an empty slot.
        slots: how many tokens an expert takes of each sequence or of the micro-batch (capacity.py).
        per_sequence: each sequence is a separate scope, so the micro-batch size does not matter.
        rank: ranking function (ranking.py).

    Returns:
        `slots.place` slots per expert; without these, B * capacity if per_sequence, else capacity slots.
    """
    length, batch, experts = logits.shape
    scores = torch.sigmoid(logits)
    # Rounded before ranking too: a ranking that subtracts logits magnifies the rounding differences of equal ones.
    ranked = rank(_coarse(logits.detach())).masked_fill(~member.unsqueeze(-1), _FOREIGN)
    if per_sequence:
        chosen = _best(ranked, slots.capacity)  # [C, B, E]
        token = chosen * batch + torch.arange(batch, device=logits.device).view(1, batch, 1)
    else:
        token = _best(ranked.reshape(length * batch, experts), slots.capacity)  # [C, E]
    token = token.reshape(-1, experts)
    if slots.place is not None:
        token = token.index_select(0, slots.place)
    token = token.t()  # [E, slots]
    valid = member.reshape(-1)[token]
    if slots.limit is not None:
        assert slots.place is not None
        scopes = slots.limit.shape[0]
        valid = valid & (slots.place // scopes < slots.limit[slots.place % scopes])
    gate = scores.reshape(length * batch, experts).t().gather(1, token) * valid
    return Selection(token, gate, valid)


def decided(taken: Tensor, gates: Tensor, capacity: int) -> Selection:
    """The slots for decisions that were made token by token; no token is dropped.

    Args:
        taken: [S, B, E] bool, whether the expert takes the token.
        gates: [S, B, E] fp32, the weights of the experts' outputs.
        capacity: slots per expert, at least as many as any expert takes tokens.
    """
    # A stable sort of "not taken" (0 before 1) puts each expert's taken tokens first, in their order; the rest of its
    # `capacity` slots is filled with tokens that it did not take, which `valid` marks as empty.
    flat = taken.reshape(-1, taken.shape[-1])  # [T, E]
    token = (~flat).to(torch.uint8).sort(dim=0, stable=True).indices[:capacity].t()  # taken ones first, in order
    valid = flat.t().gather(1, token)
    gate = gates.reshape(flat.shape).t().gather(1, token) * valid
    return Selection(token, gate, valid)


def dealt(selection: Selection, *, rank: int, size: int, multiple: int = 1) -> Selection:
    """A rank's part of every expert's slots: every `size`-th one, so that all ranks get tokens of similar rank.

    Args:
        selection: a choice that is the same on all ranks.
        rank: this rank.
        size: ranks that share the slots; with 1 the selection is returned.
        multiple: the number of slots of a rank is rounded up to a multiple of this with empty slots.
    """
    if size == 1:
        return selection
    slots = selection.token.shape[1]
    more = -slots % (size * multiple)
    token, gate, valid = (F.pad(part, (0, more))[:, rank::size] for part in selection)
    return Selection(token.contiguous(), gate, valid)


def rows_of(flat: Tensor, selection: Selection, *, empty_as_zero: bool) -> Tensor:
    """The hidden states in every expert's slots, [T, H] -> [E, slots, H].

    Args:
        flat: hidden states of all tokens.
        selection: the choice.
        empty_as_zero: empty slots are rows of zeros; otherwise of tokens that do not count. Where the number of empty
            slots depends on the layout, the largest value of an expert's rows, which FP8 scales by, must not.
    """
    rows = flat.index_select(0, selection.token.reshape(-1)).view(*selection.token.shape, -1)
    return rows * selection.valid.unsqueeze(-1) if empty_as_zero else rows


def chosen_by(selection: Selection, tokens: int) -> Tensor:
    """[tokens, E] bool: which experts took which token."""
    taken = torch.zeros(selection.token.shape[0], tokens, dtype=torch.bool, device=selection.token.device)
    return taken.scatter_(1, selection.token, selection.valid).t()


def count_choices(taken: Tensor, selection: Selection, own: Tensor) -> Tensor:
    """Counts what experts did with some of the tokens, as sums that may be added up over ranks.

    Args:
        taken: [T, E] bool, which experts took which token (`chosen_by`).
        selection: the choice that `taken` comes from.
        own: [T] bool, the tokens to count.

    Returns:
        [2 + E + E * E] fp64: number of tokens; number of those that no expert took; sum of gates of each expert; and
        how many tokens experts i and j both took, row by row, so that the diagonal is each expert's load.
    """
    mine = (taken & own.unsqueeze(-1)).double()
    gates = (selection.gate.detach().double() * own[selection.token]).sum(dim=1)
    missed = own.sum() - mine.amax(dim=-1).sum()
    return torch.cat((torch.stack((own.sum().double(), missed)), gates, (mine.t() @ mine).reshape(-1)))


def combine(outputs: Tensor, selection: Selection, tokens: int) -> Tensor:
    """Sum of gate * output at each token, [tokens, width], in fp32; zero where no expert took the token.

    Args:
        outputs: [E, slots, width].
        selection: the choice that `outputs` were computed for.
        tokens: number of tokens S * B.
    """
    total = torch.zeros(tokens, outputs.shape[-1], dtype=torch.float32, device=outputs.device)
    return add_weighted(total, outputs, selection)


def add_weighted(total: Tensor, outputs: Tensor, selection: Selection) -> Tensor:
    """Add gate * output to each token's row of `total` [tokens, width] in place, and return it.

    In place, because a sum over all tokens in fp32 is twice the size of the hidden states: allocating a new one for
    every group and every addition would account for most of the memory traffic of a layer besides its products.
    """
    weighted = outputs.float() * selection.gate.unsqueeze(-1)
    return total.index_add_(0, selection.token.reshape(-1), weighted.reshape(-1, outputs.shape[-1]))


def noise_key(*, seed: int, micro_batch: int, layer: int) -> int:
    """The key of a layer's noise in a micro-batch.

    Hashed, so that different seeds, micro-batches and layers get unrelated keys.

    Args:
        seed: the run's seed.
        micro_batch: number of the micro-batch in the run's stream of data, the same under every layout.
        layer: number of the layer, from 1.
    """
    place = f"{seed}/gumbel/{micro_batch}/{layer}".encode()
    return int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "little") >> 1


def gumbel_noise(shape: torch.Size, *, key: int, device: torch.device) -> Tensor:
    """The difference G' - G'' of two Gumbel samples, which is Logistic(0, 1), fp32.

    Source: MoMa section 2.5, Gumbel-Sigmoid(x) = Sigmoid(x + G' - G'').

    Args:
        shape: of the result, [S, B, E] for the logits of a group.
        key: the noise depends on it alone and not on the layout; see `noise_key`.
        device: where it is drawn; devices of other kinds draw other numbers.
    """
    generator = torch.Generator(device=device)
    generator.manual_seed(key)
    uniform = torch.rand(shape, generator=generator, device=device, dtype=torch.float32)
    return torch.logit(uniform, eps=1e-7)


def depth_choice(logits: Tensor, modality: Tensor, keep: int, quotas: tuple[int, ...] | None) -> Tensor:
    """The tokens that a Mixture-of-Depths layer processes, per sequence.

    Args:
        logits: [S, B] fp32.
        modality: [S, B] int, -1 for padding, which is taken last.
        keep: K, tokens per sequence.
        quotas: tokens of each modality (their sum is at most K) that are taken first: each modality's best; the rest of
            K is filled with the best of what remains. None: the best of all.

    Returns:
        [K, B] int64, ascending positions.
    """
    ranked = logits.detach().masked_fill(modality < 0, _FOREIGN)
    if quotas is not None:
        within = torch.zeros_like(modality, dtype=torch.bool)
        for index, quota in enumerate(quotas):
            if quota == 0:
                continue
            own = modality == index
            best = _best(ranked.masked_fill(~own, _FOREIGN), quota)
            # If a modality has fewer tokens than its quota, the rest of `best` are tokens of other modalities. Those
            # keep their value of `within`.
            within.scatter_(0, best, own.gather(0, best) | within.gather(0, best))
        # Tokens within a quota come first, then the best of the remaining ones.
        ranked = ranked.masked_fill(within, float("inf"))
    return _best(ranked, keep).sort(dim=0).values


def depth_decided(taken: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The tokens that a causal mode decided to process, padded to the same number in every sequence.

    Args:
        taken: [S, B] bool.
        keep: K, at least as many as any sequence keeps.

    Returns:
        [K, B] int64 positions, ascending where valid, and [K, B] bool: the valid ones.
    """
    index = (~taken).to(torch.uint8).sort(dim=0, stable=True).indices[:keep]
    return index, taken.gather(0, index)
