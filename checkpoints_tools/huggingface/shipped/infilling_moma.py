"""Fills holes in texts and images with models that were trained with causal masking (CM3, arXiv 2201.07520).

Shipped next to the weights. A document with holes is followed by `<mask:0>`, after which the model generates what fills
the first hole up to `<eom>`, then by `<mask:1>`, and so on.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation import LogitsProcessor

from .content_moma import part_of

HOLE = {"type": "hole"}  # a piece of `content`
MOST = 16
END, LAST_SPECIAL = "<eom>", "<eot>"


class Holes:
    """A document with holes.

    Args:
        processor: converts its pieces to ids.
        content: its pieces; a hole in a text is `{"type": "hole"}`. An image with a hole has a mask, which is a
            rectangle of its tokens: `{"type": "image", "image": ..., "mask": (x, y, width, height)}`.

    Attributes:
        document: its ids, `<s>` first and `</s>` last.
        sizes: of each hole, its number of image tokens; None: a text of any length.

    Raises:
        ValueError: the model has no tokens for holes, there are none or too many, or a mask is not inside its image.
    """

    def __init__(self, processor: Any, content: Sequence[Any]) -> None:
        tokenizer = processor.tokenizer
        known = tokenizer.get_vocab()
        if END not in known:
            raise ValueError("this model has no tokens for holes")
        self._processor = processor
        self.holes = [known[f"<mask:{number}>"] for number in range(MOST)]
        self.end, self._first_text = known[END], known[LAST_SPECIAL] + 1
        self.sizes: list[int | None] = []
        self.document = [tokenizer.bos_token_id]
        for piece in content:
            self.document += self._ids(piece)
        self.document.append(tokenizer.eos_token_id)
        if not self.sizes:
            raise ValueError("there is no hole to fill")

    def _ids(self, piece: Any) -> list[int]:
        kind, mask = (piece.get("type"), piece.get("mask")) if isinstance(piece, dict) else (None, None)
        if kind == "hole":
            return [self._new(None)]
        if mask is not None and kind != "image":
            raise ValueError(f"only images have masks, not {kind!r}")
        ids: list[int] = self._processor.encode([part_of(piece)], begin=False)
        if mask is None:
            return ids
        opens, *codes, closes = ids
        found, before = [opens], 0
        for start, stop in mask_runs(mask, len(codes)):
            found += [*codes[before:start], self._new(stop - start)]
            before = stop
        return [*found, *codes[before:], closes]

    def _new(self, size: int | None) -> int:
        if len(self.sizes) == MOST:
            raise ValueError(f"there are more than {MOST} holes; each row of a mask is one")
        self.sizes.append(size)
        return self.holes[len(self.sizes) - 1]

    def prompt(self, fillings: Sequence[Sequence[int]]) -> list[int]:
        """Ids after which the model generates the next filling, given those of the first holes."""
        filled = [[self.holes[number], *own, self.end] for number, own in enumerate(fillings)]
        return [*self.document, *(token for own in filled for token in own), self.holes[len(fillings)]]

    def grammar(self, number: int) -> "FillingGrammar":
        """Restricts what fills a hole to tokens that may be there."""
        size, ranges = self.sizes[number], {name: (first, end) for name, first, end in self._processor.modalities}
        if size is None:
            allowed = (self._first_text, self._processor.modalities[0][2])
        else:
            first, end = ranges["image"]
            allowed = (first, min(end, first + self._processor.codes.count))
        return FillingGrammar(*allowed, hole=self.holes[number], end=self.end, tokens=size)

    def filled(self, fillings: Sequence[Sequence[int]]) -> list[int]:
        """Ids of the document with the fillings in place of the holes."""
        of = dict(zip(self.holes, fillings, strict=False))
        return [token for one in self.document for token in of.get(one, [one])]


class FillingGrammar(LogitsProcessor):
    """What fills a hole: tokens of one range, then the end of the filling.

    Args:
        first, last: half-open range of the tokens.
        hole: the last token of the prompt.
        end: id of the end.
        tokens: how many; None: any number.
    """

    def __init__(self, first: int, last: int, *, hole: int, end: int, tokens: int | None) -> None:
        self.first, self.last, self.hole, self.end, self.tokens = first, last, hole, end, tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, vocabulary] with -inf for tokens that are not allowed next."""
        masked = torch.full_like(scores, float("-inf"))
        for row, ids in enumerate(input_ids.tolist()):
            done = ids[::-1].index(self.hole)
            if self.tokens is None or done < self.tokens:
                masked[row, self.first : self.last] = scores[row, self.first : self.last]
            if self.tokens is None or done >= self.tokens:
                masked[row, self.end] = scores[row, self.end]
        return masked


def mask_runs(mask: Sequence[int], tokens: int) -> list[tuple[int, int]]:
    """Consecutive tokens of a square image inside a mask, half-open; rows over its whole width are one run.

    Args:
        mask: x, y, width and height in tokens.
        tokens: of the image, row by row.

    Raises:
        ValueError: the mask is not inside the image.
    """
    edge = math.isqrt(tokens)
    x, y, width, height = (int(number) for number in mask)
    if edge * edge != tokens:
        raise ValueError(f"an image of {tokens} tokens has no square grid for a mask")
    if min(x, y) < 0 or min(width, height) < 1 or x + width > edge or y + height > edge:
        raise ValueError(f"the mask {x},{y},{width},{height} is not inside the image of {edge} x {edge} tokens")
    if width == edge:
        return [(y * edge, (y + height) * edge)]
    return [(row * edge + x, row * edge + x + width) for row in range(y, y + height)]


@torch.no_grad()
def fill(processor: Any, model: Any, content: Sequence[Any], **generation: Any) -> list[list[int]]:
    """Fillings of the holes of one document, one after another, with `model.generate`.

    Args:
        processor: of the model.
        model: trained with causal masking.
        content: the document, as for `Holes`.
        generation: further arguments of `generate`, e.g. do_sample and temperature.

    Raises:
        ValueError: as `Holes`; a prompt leaves no room in the model's context.
    """
    holes = Holes(processor, content)
    fillings: list[list[int]] = []
    for number, size in enumerate(holes.sizes):
        prompt = holes.prompt(fillings)
        room = processor.tokenizer.model_max_length - len(prompt)
        if room < (1 if size is None else size + 1):
            raise ValueError(f"a prompt of {len(prompt)} tokens leaves no room in the model's context")
        ids = torch.tensor([prompt], device=model.device)
        limit = {"max_new_tokens": room} if "max_new_tokens" not in generation or size is not None else {}
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            logits_processor=[holes.grammar(number)],
            eos_token_id=holes.end,
            suppress_tokens=[],  # those of the model have the end of a filling; the grammar excludes all others
            **{**generation, **limit},
        )
        own = out[0, len(prompt) :].tolist()
        fillings.append(own[: own.index(holes.end)] if holes.end in own else own)
    return fillings


__all__ = ["HOLE", "FillingGrammar", "Holes", "fill", "mask_runs"]
