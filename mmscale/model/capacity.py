"""The number of tokens that an expert takes of a sequence or micro-batch, and their slots.

`nominal`: from the modality's nominal share, the same in every batch, so that shapes are static. `actual`: from the
present tokens, k_e = ceil(factor * b / E) (MoMa, arXiv 2407.21770, section 2.2). Actual counts are known on the host:
the loader counts this rank's tokens, and the tables of packed documents give those of every expert-parallel rank. So
all ranks of an exchange compute the same number of slots without communication and without waiting for the device.

Shapes: S tokens of a sequence, B sequences of the micro-batch, M modalities, E experts of a group, R expert-parallel
ranks, Q scopes in which experts choose (B sequences, or 1 micro-batch).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mmscale.runtime import device


class Slots(NamedTuple):
    """The slots of every expert of a group.

    An expert's slots form a table [capacity, Q]: row p holds, for each of the Q scopes, the p-th best token of that
    scope.

    Attributes:
        capacity: largest number of tokens that an expert takes of any scope, i.e. rows of the table.
        limit: [Q] tokens that an expert takes of each scope; None: `capacity` of each.
        place: [slots] the used entries of the table as row * Q + scope, without duplicates; None: all entries.
    """

    capacity: int
    limit: Tensor | None = None
    place: Tensor | None = None


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of each modality, on the host.

    Attributes:
        own: [B, M] int64, of this rank's micro-batch.
        everyone: [R, B, M] int64, of the micro-batches that the expert-parallel ranks process at the same
            time, this rank's among them.
        keep: tokens of each sequence that a Mixture-of-Depths layer keeps. Which ones it keeps is known on the device
            only. None: all tokens.
        quotas: tokens of each modality that the layer takes first; None: there are no quotas.
        local: [M] int64, of this context-parallel rank's tokens; None: of `own`.
    """

    own: NDArray[np.int64]
    everyone: NDArray[np.int64]
    keep: int | None = None
    quotas: tuple[int, ...] | None = None
    local: NDArray[np.int64] | None = None

    def rows(self, total: int) -> list[int] | None:
        """Tokens of each modality among those that this rank computes, with padding in the last modality.

        Args:
            total: number of these tokens, with padding.

        Returns:
            [M], which sum up to `total`; None inside a Mixture-of-Depths layer.
        """
        if self.keep is not None:
            return None
        first = (self.own.sum(axis=0) if self.local is None else self.local)[:-1].tolist()
        return [*first, total - sum(first)]

    def at_most(self, total: int) -> list[int]:
        """Upper bounds of the tokens of each modality among those that this rank computes; exact where `rows` is.

        Args:
            total: number of these tokens, with padding, which counts as the last modality.
        """
        if (exact := self.rows(total)) is not None:
            return exact
        first = range(self.own.shape[1] - 1)
        return [*(min(total, int(self.most(self.own, (number,)).sum())) for number in first), total]

    def kept(self, keep: int, quotas: tuple[int, ...] | None) -> TokenCounts:
        """The counts for the layers inside a Mixture-of-Depths layer that keeps only some of the tokens."""
        return replace(self, keep=keep, quotas=quotas)

    def most(self, tokens: NDArray[np.int64], modalities: tuple[int, ...]) -> NDArray[np.int64]:
        """Upper bound of the tokens of these modalities in a sequence; exact without Mixture-of-Depths.

        Args:
            tokens: [..., M], `own` or `everyone`.
            modalities: those of a group of experts.

        Returns:
            [...] int64.
        """
        found: NDArray[np.int64] = tokens[..., list(modalities)].sum(axis=-1)
        if self.keep is None:
            return found
        reserved = np.zeros_like(found)
        if self.quotas is not None:
            others = [number for number in range(tokens.shape[-1]) if number not in modalities]
            reserved = np.minimum(tokens, np.array(self.quotas))[..., others].sum(axis=-1)
        return np.minimum(found, self.keep - reserved)


Numbers = TypeVar("Numbers", NDArray[np.float64], Tensor)


def actual_capacity(tokens: Numbers, experts: int, *, factor: float, multiple: int) -> Numbers:
    """Tokens that each expert takes of scopes with this many tokens of its group.

    One formula for the host (NumPy) and the device (torch), which must agree: ceil(factor * tokens / experts), rounded
    up to `multiple`, at most all tokens; 0 if there are none. It increases with the tokens, so the capacity of an upper
    bound is an upper bound.

    Args:
        tokens: whole numbers in fp64, any shape.
        experts: E, over all expert-parallel ranks.
        factor: model.experts.capacity_factor.
        multiple: `capacity_multiple` of mmscale.config.precision.fp8 [tokens].
    """
    # As in derived.expert_capacity: 1e-9 keeps a quotient that is an integer up to rounding from being rounded up.
    exact = -((1e-9 - factor * tokens / experts) // 1)
    rounded = -(-exact // multiple) * multiple
    return tokens - (tokens - rounded).clip(0)  # min(tokens, rounded), for NumPy and torch


def actual_slots(
    counts: TokenCounts,
    member: Tensor,
    modalities: tuple[int, ...],
    experts: int,
    *,
    per_sequence: bool,
    factor: float,
    multiple: int,
) -> Slots:
    """Slots for the present tokens; the same number on every expert-parallel rank.

    Args:
        counts: the host's counts of the micro-batches of all ranks of the exchange.
        member: [S, B] bool on the device, tokens of the group.
        modalities: those of the group.
        experts: E, over all expert-parallel ranks.
        per_sequence: experts choose in each sequence separately.
        factor: model.experts.capacity_factor.
        multiple: slots are a multiple of this, for FP8.

    Returns:
        As many slots as the fullest rank's expert needs, at least one, rounded up to `multiple`. Slots beyond a scope's
        own limit, which is counted on the device, stay empty.
    """
    tokens, scopes = member.numel(), member.shape[1] if per_sequence else 1

    def bounds(table: NDArray[np.int64]) -> NDArray[np.int64]:
        found = counts.most(table, modalities)
        found = found if per_sequence else found.sum(axis=-1, keepdims=True)
        return actual_capacity(found.astype(np.float64), experts, factor=factor, multiple=multiple).astype(np.int64)

    # Example: 2 scopes, E = 2, factor = 1. Here the scopes hold 6 and 2 tokens of the group, so an expert takes 3 + 1;
    # on the fullest rank it takes 5. All ranks exchange messages of the same size, so every expert gets 5 slots here
    # too. The fifth is added to a scope (`_filled_up`) and stays empty, because its row lies beyond that scope's
    # `limit`.
    most = max(1, int(bounds(counts.everyone).sum(axis=-1).max()))
    slots = min(tokens, -(-most // multiple) * multiple)
    places = _filled_up([int(bound) for bound in bounds(counts.own)], slots, tokens // scopes)
    # Entry (row p, scope q) of the table of slots is number p * Q + q; scope q uses rows 0 ... places[q] - 1.
    where = np.concatenate([np.arange(count) * scopes + scope for scope, count in enumerate(places)])
    found = member.sum(dim=0) if per_sequence else member.sum().view(1)
    return Slots(
        capacity=max(places),
        limit=actual_capacity(found.double(), experts, factor=factor, multiple=multiple).long(),
        place=device.upload(where, member.device),
    )


def _filled_up(places: list[int], slots: int, length: int) -> list[int]:
    """Extends the numbers of rows per scope until they add up to `slots`.

    A scope gets at most `length` rows, its number of tokens, so that every slot stands for another token.
    """
    left = slots - sum(places)
    found = []
    for own in places:
        more = min(left, length - own)
        found.append(own + more)
        left -= more
    assert left == 0, "the slots of all ranks are at least this rank's, and at most all tokens"
    return found
