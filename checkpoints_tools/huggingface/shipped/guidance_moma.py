"""Logits processors that strengthen the effect of the prompt on images and other items. Shipped next to the weights.

Both compare the probabilities of an item's next token with those of the same item without its prompt: classifier-free
guidance moves away from the second, contrastive decoding (CD-K) takes the difference among likely tokens.

Shapes: B rows, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation import LogitsProcessor

ALPHA = 0.1  # of contrastive decoding, as in arXiv 2210.15097


class UnconditionalBranch:
    """Computes the distribution of an item's next token without the prompt of its row.

    The branch reads the tokens of `before`, the begin token and the item so far. transformers' own guidance runs one
    unconditional branch from the first token on; here rows may begin items at any time. The branch has a cache in which
    a row's older columns are masked when the row begins another item. The cache is dropped when no row is inside an
    item, and when another sequence is continued.

    Args:
        model: a causal language model.
        first, end: half-open range of the item's tokens.
        tokens: of an item.
        opens: id of its begin token.
        before: ids before the begin token: `<s>`, or `<s> <mask:0>` for models trained with causal masking.
        pad: id of padding.
        use_cache: without it every token of an item needs a pass over the item so far.
    """

    def __init__(
        self,
        model: Any,
        *,
        first: int,
        end: int,
        tokens: int,
        opens: int,
        before: Sequence[int],
        pad: int = 0,
        use_cache: bool = True,
    ) -> None:
        self.model, self.first, self.end, self.tokens, self.opens = model, first, end, tokens, opens
        self.before, self.pad = list(before), pad
        self._compute = self._with_cache if use_cache else self._without_cache
        self._cache: Any = None
        self._seen: torch.Tensor | None = None  # [B, columns], which columns a row attends to
        self._last: torch.Tensor | None = None  # [B, S], the sequences of the last call

    def __call__(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B] bool: the next token is the item's; logits [B, V], without meaning elsewhere, or None if none is."""
        done = self._item_tokens(input_ids)
        drawing = (done >= 0) & (done < self.tokens)
        if self._last is None or not torch.equal(input_ids[:, :-1], self._last):  # other sequences, or reordered beams
            self._cache = self._seen = None
        self._last = input_ids
        if not bool(drawing.any()):
            self._cache = self._seen = None
            return drawing, None
        return drawing, self._compute(input_ids, done, drawing)

    def _item_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """[B]: tokens of the item that a row is in, 0 after the begin token; -1 outside of items."""
        recent = ids[:, -(self.tokens + 1) :]
        of_item = (recent >= self.first) & (recent < self.end)
        trailing = of_item.flip(1).long().cumprod(dim=1).sum(dim=1)
        before = (recent.shape[1] - 1 - trailing).clamp(min=0)
        begun = recent.gather(1, before.unsqueeze(1)).squeeze(1) == self.opens
        return torch.where(begun, trailing, -1)

    def _without_cache(self, input_ids: torch.Tensor, done: torch.Tensor, drawing: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] after the branch's tokens; in rows outside of items, after its first one."""
        kept = len(self.before)
        own = torch.where(drawing, done + 1 + kept, 1).unsqueeze(1)  # columns of the branch in each row
        width = int(own.max())
        place = torch.arange(width, device=input_ids.device).unsqueeze(0) - width + own  # in the branch
        before = torch.tensor(self.before, device=input_ids.device)[place.clamp(0, kept - 1)]
        item = torch.nn.functional.pad(input_ids, (max(0, width - input_ids.shape[1]), 0), value=self.pad)[:, -width:]
        ids = torch.where(place < 0, self.pad, torch.where(place < kept, before, item))
        out = self.model(
            input_ids=ids,
            attention_mask=(place >= 0).long(),
            position_ids=place.clamp(min=0),
            use_cache=False,
            logits_to_keep=1,
        )
        logits: torch.Tensor = out.logits[:, -1]
        return logits

    def _with_cache(self, input_ids: torch.Tensor, done: torch.Tensor, drawing: torch.Tensor) -> torch.Tensor:
        """The same with this branch's own cache."""
        begins, goes_on = drawing & (done == 0), drawing & (done > 0)
        if self._seen is None and bool(goes_on.any()):  # the first call is in the middle of an item
            return self._without_cache(input_ids, done, drawing)
        kept = len(self.before)
        # A row that begins an item adds columns for the tokens before it; the other rows fill these with padding.
        added = kept if bool(begins.any()) else 0
        before = torch.tensor(self.before[:added], dtype=input_ids.dtype, device=input_ids.device).unsqueeze(0)
        newest = torch.where(drawing, input_ids[:, -1], self.pad).unsqueeze(1)
        ids = torch.cat((torch.where(begins.unsqueeze(1), before, self.pad), newest), dim=1)
        first = torch.arange(added, device=input_ids.device).expand(len(ids), -1)
        positions = torch.cat((first, torch.where(drawing, done + kept, 0).unsqueeze(1)), dim=1)
        # Rows outside of items attend to their new columns, because a row of a mask must not be empty.
        fresh = torch.ones_like(ids, dtype=torch.bool)
        fresh[:, :added] = ~goes_on.unsqueeze(1)
        older = ids.new_zeros((len(ids), 0), dtype=torch.bool) if self._seen is None else self._seen
        self._seen = torch.cat((older & goes_on.unsqueeze(1), fresh), dim=1)
        out = self.model(
            input_ids=ids,
            attention_mask=self._seen.long(),
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = out.past_key_values
        logits: torch.Tensor = out.logits[:, -1]
        return logits


class ClassifierFreeGuidance(LogitsProcessor):
    """Moves scores of an item's tokens away from those of the same item without its prompt.

    u + scale * (c - u) with the log-probabilities c of the row and u of the branch (used by Chameleon 2405.09818 and
    others; Ho and Salimans 2207.12598). It compares complete distributions, so it comes before processors that exclude
    tokens.

    Args:
        branch: computes u.
        scale: 1: no change.
    """

    def __init__(self, branch: UnconditionalBranch, *, scale: float) -> None:
        self.branch, self.scale = branch, scale

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V], changed in rows whose next token is an item's."""
        drawing, logits = self.branch(input_ids)
        if logits is None:
            return scores
        without = logits.to(scores.dtype).log_softmax(dim=-1)
        guided = without + self.scale * (scores.log_softmax(dim=-1) - without)
        return torch.where(drawing.unsqueeze(1), guided, scores)


class ContrastiveDecoding(LogitsProcessor):
    """Contrastive decoding with a top-k cut-off (CD-K; CM3Leon, arXiv 2309.02591, section 3.1).

    Candidates are the tokens with p(t | prompt) >= alpha times the k-th largest of these probabilities. Their scores
    are log p(t | prompt) - log p(t | no prompt); others are excluded. Both distributions are those over the tokens that
    earlier processors left, so it comes after processors that exclude tokens.

    Args:
        branch: computes the distribution without the prompt.
        k: from 1 on; 1 is contrastive decoding (arXiv 2210.15097). Of fewer than k tokens the least likely counts.
        alpha: above 0 and at most 1.

    Raises:
        ValueError: k or alpha is out of range.
    """

    def __init__(self, branch: UnconditionalBranch, *, k: int, alpha: float) -> None:
        if k < 1 or not 0.0 < alpha <= 1.0:
            raise ValueError(f"k={k} must be at least 1, and alpha={alpha} above 0 and at most 1")
        self.branch, self.k, self.alpha = branch, k, alpha

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V], changed in rows whose next token is an item's."""
        drawing, logits = self.branch(input_ids)
        if logits is None:
            return scores
        return torch.where(drawing.unsqueeze(1), contrasted(scores, logits, k=self.k, alpha=self.alpha), scores)


def contrasted(scores: torch.Tensor, without: torch.Tensor, *, k: int, alpha: float) -> torch.Tensor:
    """Scores of contrastive decoding, [..., V].

    Args:
        scores: logits with the prompt, [..., V]; -inf for tokens that are excluded.
        without: logits without it, [..., V].
        k: rank of the probability that candidates are compared with.
        alpha: share of it that a candidate has at least.
    """
    excluded = scores.isneginf()
    given = scores.log_softmax(dim=-1)
    alone = without.to(scores.dtype).masked_fill(excluded, float("-inf")).log_softmax(dim=-1)
    ranked = given.sort(dim=-1, descending=True).values
    left = (~excluded).sum(dim=-1, keepdim=True)
    floor = ranked.gather(-1, (left - 1).clamp(min=0, max=k - 1)) + math.log(alpha)
    return (given - alone).masked_fill(excluded | (given < floor), float("-inf"))


__all__ = ["ALPHA", "ClassifierFreeGuidance", "ContrastiveDecoding", "UnconditionalBranch", "contrasted"]
