"""Logits processors that keep generated images and other items complete, and exclude special tokens.

Shipped next to the weights.

B rows.
"""

from collections.abc import Sequence

import torch
from transformers.generation import LogitsProcessor


class ImageGrammar(LogitsProcessor):
    """Makes generated images decodable: `<boi>`, the image's tokens, `<eoi>`, and no image token anywhere else.

    For `generate(..., logits_processor=[processor.image_grammar()])`.

    Args:
        first, end: half-open range of image tokens.
        tokens: length of an image.
        boi, eoi: ids around an image.
        codes: number of ids in the range that have a code, counted from the first; None: all. The others are never
            generated.
    """

    def __init__(self, first: int, end: int, *, tokens: int, boi: int, eoi: int, codes: int | None = None) -> None:
        self.first, self.end, self.tokens, self.boi, self.eoi = first, end, tokens, boi, eoi
        self.end_of_codes = end if codes is None else min(first + codes, end)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, vocabulary] with -inf for tokens that are not allowed next."""
        masked = torch.full_like(scores, float("-inf"))
        recent = input_ids[:, -(self.tokens + 1) :]
        for row, ids in enumerate(recent.tolist()):
            since = ids[::-1].index(self.boi) if self.boi in ids else None
            if since is not None and self.eoi not in ids[len(ids) - since :]:
                image = slice(self.first, self.end_of_codes)
                allowed = image if since < self.tokens else slice(self.eoi, self.eoi + 1)
                masked[row, allowed] = scores[row, allowed]
            else:
                masked[row] = scores[row]
                masked[row, self.first : self.end] = float("-inf")
                masked[row, self.eoi] = float("-inf")
        return masked


class SpecialGrammar(LogitsProcessor):
    """Excludes special tokens that cannot follow.

    Args:
        never: ids that no generated token has: padding, `<s>`, holes and the end of their fillings, and begin and end
            tokens of items that are not generated.
        roles: ids that begin a message. One follows only the tokens `after`.
        after: `<s>` and the end of a message.
    """

    def __init__(self, never: Sequence[int], *, roles: Sequence[int] = (), after: Sequence[int] = ()) -> None:
        self.never, self.roles, self.after = list(never), list(roles), list(after)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, vocabulary] with -inf for tokens that are not allowed next."""
        scores = scores.clone()
        scores[:, self.never] = float("-inf")
        if self.roles:
            begins = torch.isin(input_ids[:, -1], torch.tensor(self.after, device=input_ids.device))
            inside = (~begins).unsqueeze(1)
            scores[:, self.roles] = scores[:, self.roles].masked_fill(inside, float("-inf"))
        return scores


class Grammar(LogitsProcessor):
    """Several grammars, applied one after the other. Items of one modality are never inside those of another."""

    def __init__(self, parts: Sequence[LogitsProcessor]) -> None:
        self.parts = list(parts)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, vocabulary] with -inf for tokens that are not allowed next."""
        for part in self.parts:
            scores = part(input_ids, scores)
        return scores


__all__ = ["Grammar", "ImageGrammar", "SpecialGrammar"]
