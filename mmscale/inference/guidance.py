"""Measures which classifier-free guidance fits held-out items best (`mmscale sample --guidance auto`).

An item that follows a prompt in a document is scored under guided probabilities, as generation would use them
(shipped/guidance_moma.py): lower is better. A model that has learned its prompts well needs no guidance.

Shapes: R rows, S tokens, K tokens of an item, V ids of an item's range.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmscale.data.vocab import BOS, PAD
from mmscale.inference.generate import ItemRules

GUIDANCES = (1.0, 1.25, 1.5, 2.0, 3.0, 5.0)
_TOKENS = 8192  # tokens that are computed at once, padding included; a longer document is computed alone


@dataclass(frozen=True)
class GuidanceSweep:
    """Losses of held-out items under guidance.

    Attributes:
        items: number of scored items.
        losses: mean cross entropy of their tokens [nats] by guidance.
    """

    items: int
    losses: dict[float, float]

    @property
    def best(self) -> float:
        """The guidance with the lowest loss; of equal ones the smallest."""
        return min(self.losses, key=lambda guidance: (self.losses[guidance], guidance))


def items_behind_prompts(ids: NDArray[np.int64], item: ItemRules) -> list[int]:
    """Places of the begin tokens of complete items that have a prompt, i.e. tokens between them and `<s>`.

    Args:
        ids: of a document [tokens].
        item: begin and end token and grammar of the items.
    """
    begun = np.flatnonzero(ids == item.opens).tolist()
    return [place for place in begun if place > 1 and _codes(ids, place, item) is not None]


@torch.no_grad()
def sweep(
    model: Any, documents: Sequence[NDArray[np.int64]], item: ItemRules, *, before: Sequence[int] = (BOS,)
) -> GuidanceSweep | None:
    """Score the items of held-out documents under each guidance; None: no document has an item after a prompt.

    Args:
        model: a causal language model of transformers in evaluation mode.
        documents: ids [S] of each, `<s>` first.
        item: the kind of item.
        before: ids before the begin token in the branch without the prompt.
    """
    with_prompt: list[NDArray[np.int64]] = []
    without: list[NDArray[np.int64]] = []
    codes: list[NDArray[np.int64]] = []
    for ids in documents:
        for place in items_behind_prompts(ids, item):
            own = _codes(ids, place, item)
            assert own is not None
            with_prompt.append(ids[: place + item.tokens])  # the last code is only predicted
            without.append(np.concatenate(([*before, item.opens], own[:-1])))
            codes.append(own - item.first)
    if not codes:
        return None
    sums = dict.fromkeys(GUIDANCES, 0.0)
    for rows in _parts([len(ids) for ids in with_prompt]):
        given, alone = (_logits(model, [ids[row] for row in rows], item) for ids in (with_prompt, without))
        right = torch.from_numpy(np.stack([codes[row] for row in rows]))
        for guidance in GUIDANCES:
            guided = (alone + guidance * (given - alone)).log_softmax(dim=-1)
            sums[guidance] -= float(guided.gather(2, right.unsqueeze(2)).double().sum())
    tokens = len(codes) * item.tokens
    return GuidanceSweep(len(codes), {guidance: total / tokens for guidance, total in sums.items()})


def _parts(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows that are computed at once, of nearly the same length."""
    part: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if part and (len(part) + 1) * lengths[row] > _TOKENS:
            yield part
            part = []
        part.append(row)
    yield part


def _codes(ids: NDArray[np.int64], place: int, item: ItemRules) -> NDArray[np.int64] | None:
    """The tokens of the item that begins at a place; None: it is incomplete."""
    own = ids[place + 1 : place + 1 + item.tokens]
    whole = len(own) == item.tokens and bool(((own >= item.first) & (own < item.end)).all())
    return own if whole else None


def _logits(model: Any, rows: Sequence[NDArray[np.int64]], item: ItemRules) -> Tensor:
    """Logits of the item's range [R, K, V] at the last K places of each row, on the CPU.

    They differ from log-probabilities by a constant per place, which cancels in the softmax over the range.
    """
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), PAD), torch.zeros(len(rows), longest, dtype=torch.long)
    for row, own in enumerate(rows):  # padding comes last, where no token of a causal model attends to it
        ids[row, : len(own)] = torch.from_numpy(own)
        mask[row, : len(own)] = 1
    first = min(map(len, rows)) - item.tokens  # logits of earlier places are not needed
    kept = {"logits_to_keep": longest - first} if _keeps(model) else {}
    out = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False, **kept)
    before = longest - out.logits.shape[1]
    found = []
    for logits, own in zip(out.logits, rows, strict=True):
        end = len(own) - before
        found.append(logits[end - item.tokens : end, item.first : item.end].float().cpu())
    return torch.stack(found)


def _keeps(model: Any) -> bool:
    """Whether a model can skip the logits of earlier places."""
    return "logits_to_keep" in inspect.signature(getattr(model, "forward", model)).parameters
